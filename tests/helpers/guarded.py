"""Arrays whose end is the end of a page: a read or write behind them ends the process."""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from llm_barber.native import threads, weight


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


def guard_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard outputs and the memory that products work in; few values and few rows of inputs are divided, too."""
    new_empty, memory = Tensor.new_empty, []  # the user of `memory` has only the address

    def scratch(size: int) -> Tensor:
        memory.append(guarded(torch.full((-(-size // 64) * 64,), 255).byte()))
        return memory[-1]

    monkeypatch.setattr(Tensor, "new_empty", lambda *arguments: guarded(new_empty(*arguments)))
    monkeypatch.setattr(weight._scratch, "of", scratch)
    monkeypatch.setattr(threads, "VALUES_A_THREAD", 16)
    monkeypatch.setattr(weight, "TOGETHER", 40)
