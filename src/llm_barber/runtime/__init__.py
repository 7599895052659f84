"""Run pruned models: packed linears, kernels, loading as a transformers model."""
