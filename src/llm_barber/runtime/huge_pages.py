"""Weights in huge pages of memory: a processor translates one address where small pages need 512.

Decoding reads every weight once a token. With pages of 4 KiB on a virtual machine such reads reach two thirds of the
speed that they reach with pages of 2 MiB (docs/notebook/packed-speed.md).
"""

import ctypes
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from llm_barber.checkpoint.memory import copied, ordinary_memory

PAGE, CHUNK, ALIGNMENT = 2**21, 2**26, 64  # bytes
AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE")  # on Linux


class HugePages:
    """Memory for many tensors, taken in chunks; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._start = self._next = self._end = 0  # addresses; of the chunk's first page, its free bytes, and its end
        self._chunks: list[tuple[int, int]] = []  # first and last addresses of all

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor in this memory: a copy, unless it is there already.

        It stays where it is on another device than the CPU, and where the system has no huge pages.
        """
        is_here = any(start <= tensor.data_ptr() < end for start, end in self._chunks) if AVAILABLE else True
        return tensor if tensor.device.type != "cpu" or is_here else copied(tensor, self.empty)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory, or in ordinary memory where the system has no huge pages.

        It is contiguous and has a storage of its own.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if not AVAILABLE or not size:
            return ordinary_memory(shape, dtype)
        if self._next + size > self._end:
            self._take_chunk(size)
        assert self._chunk is not None
        values = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._next - self._start).view(shape)
        self._next += -(-size // ALIGNMENT) * ALIGNMENT
        return values

    def _take_chunk(self, size: int) -> None:
        length = max(CHUNK, -(-size // PAGE) * PAGE) + PAGE
        self._chunk = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # the system may have been built without huge pages
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._chunk))
        self._next = -(-self._start // PAGE) * PAGE
        self._end = self._start + length
        self._chunks.append((self._start, self._end))
