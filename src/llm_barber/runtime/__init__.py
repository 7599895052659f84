"""Running what was pruned: packed linears, kernels, loading as a transformers model."""
