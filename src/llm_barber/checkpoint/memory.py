"""Memory for tensors that are read from files: the reader asks for it once sizes and counts are checked."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from llm_barber.errors import first_line

Memory = Callable[[tuple[int, ...], torch.dtype], Tensor]  # makes a contiguous tensor of a shape and a dtype


def ordinary_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of the CPU."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pinned_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that a GPU can copy from and to while it computes.

    Where the system refuses to pin memory, as some containers do, it is ordinary memory, with a warning.
    """
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:  # CUDA's errors are of this class
        warnings.warn(f"memory cannot be pinned, so the GPU waits for copies: {first_line(error)}", stacklevel=2)
        return ordinary_memory(shape, dtype)


def copied(tensor: Tensor, memory: Memory) -> Tensor:
    """Copy a tensor, which may lie in a mapped file, into new memory: one copy."""
    return memory(tuple(tensor.shape), tensor.dtype).copy_(tensor)
