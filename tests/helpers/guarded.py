"""Arrays whose end is the end of a page: a read or write behind them ends the process."""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from llm_barber.native import amx, threads


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


def guard_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard what `Tensor.new_empty` makes: the outputs of products."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *arguments: guarded(new_empty(*arguments)))


def guard_products_by_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard outputs and the memory that AMX works in; few rows of inputs and few values are divided, too."""
    guard_outputs(monkeypatch)
    memory: list[Tensor] = []  # its user has only the address

    def scratch(size: int) -> Tensor:
        memory.append(guarded(torch.full((-(-size // 64) * 64,), 255).byte()))
        return memory[-1]

    monkeypatch.setattr(amx._scratch, "of", scratch)
    monkeypatch.setattr(threads, "VALUES_A_THREAD", 16)
    monkeypatch.setattr(amx, "TOGETHER", 40)
