"""Kernels for GPUs; each needs Triton (the extra `gpu`), which the rest of the package does without."""
