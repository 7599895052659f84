"""Read and write checkpoints. Files only, no mathematics."""
