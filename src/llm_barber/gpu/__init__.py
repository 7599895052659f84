"""What a GPU computes between matrix products, by Triton kernels; without Triton PyTorch's operations do the same."""
