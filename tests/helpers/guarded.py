"""Arrays whose end is the end of a page: a read or write behind them ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor


def guarded(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory behind which a page cannot be read or written."""
    if not tensor.numel():
        return tensor
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)  # the tensor keeps it
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protected = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None, use_errno=True).mprotect(protected, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size)
    return copy.copy_(tensor.flatten()).view(tensor.shape)
