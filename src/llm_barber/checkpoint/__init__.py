"""Files: reading and writing checkpoints. No math."""
