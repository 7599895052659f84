"""Commands that work on finished checkpoints, and the demonstration."""
