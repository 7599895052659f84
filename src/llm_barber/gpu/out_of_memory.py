"""Errors that say that a GPU is out of memory."""

import re

import torch

# Parts of errors that say that a device is out of memory: of CUDA's runtime, its driver, ROCm, NCCL and Triton; of the
# allocations of cuBLAS, cuDNN, cuSOLVER, cuSPARSE and cuFFT; of the same libraries where a handle finds no room.
OUT_OF_MEMORY = re.compile(
    "out of memory|ALLOC_FAILED|(NOT_INITIALIZED|INTERNAL_ERROR).*Create|CUDNN_STATUS_NOT_INITIALIZED", re.IGNORECASE
)


def is_out_of_memory(error: Exception) -> bool:
    """Test whether an error of PyTorch's says that the device is out of memory."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
