"""What a run will cost, from a model's configuration alone: no weights are read."""
