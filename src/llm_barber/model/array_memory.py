"""Memory for arrays of calibration activations: on the device, in host memory, or in mapped files."""

import os
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llm_barber.errors import first_line
from llm_barber.gpu.out_of_memory import is_out_of_memory

CPU = torch.device("cpu")


@dataclass
class ArrayMemory:
    """Allocates arrays: on the device within `room`, in host memory up to `limit`, then in `folder`.

    Args:
        device: the device that computes.
        room: bytes of the device's memory that arrays may still take; None: none any more, or the device is a CPU,
            whose memory is host memory.
        limit: bytes of host memory that all arrays together may take; None: no limit. Further arrays are files.
        folder: the folder of the files; None: that of temporary files.
        used: bytes of host memory that arrays take, spare blocks included.
        spare: number of spare blocks of pinned memory by their size. The block of an array that is gone is kept for
            later arrays.
    """

    device: torch.device = CPU
    room: int | None = None
    limit: int | None = None
    folder: Path | None = None
    used: int = 0
    spare: Counter[int] = field(default_factory=Counter)

    @property
    def pinned(self) -> bool:
        """True if arrays in host memory are pinned, so that the device can copy while it computes."""
        return self.device.type != "cpu"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate an array without initialising it, on the device if there is room.

        Raises:
            OSError: as `empty_off_device`.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.room is None or size > self.room:
            return self.empty_off_device(shape, dtype)
        try:
            array = torch.empty(shape, dtype=dtype, device=self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.room = None  # the device has less free memory than that
            return self.empty_off_device(shape, dtype)
        self.room -= size
        weakref.finalize(array, self._give_back_room, size)
        return array

    def keep_on_device(self, tensors: Collection[Tensor]) -> bool:
        """Count tensors that are on the device as arrays, until they are gone; False: there is not enough room."""
        if self.room is None or sum(tensor.nbytes for tensor in tensors) > self.room:
            return False
        for tensor in tensors:
            self.room -= tensor.nbytes
            weakref.finalize(tensor, self._give_back_room, tensor.nbytes)
        return True

    def empty_off_device(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool | None = None) -> Tensor:
        """Allocate an array in host memory or a file, without initialising it.

        Args:
            shape: the array's shape.
            dtype: its dtype.
            pinned: whether host memory is pinned; None: if the device is not a CPU. Where the system refuses to pin
                memory it is ordinary memory, counted as pinned, with a warning.

        Raises:
            OSError: the array has to be a file, and the disk is full; the error names the folder.
        """
        pinned = self.pinned if pinned is None else pinned
        size = torch.Size(shape).numel() * dtype.itemsize
        block = block_size(size) if pinned else size
        spare = pinned and self.spare[block] > 0
        if self.limit is None or spare or self.used + block <= self.limit:
            if spare:
                self.spare[block] -= 1
            else:
                self.used += block
            array = _empty_pinned(shape, dtype) if pinned else torch.empty(shape, dtype=dtype)
            weakref.finalize(array, self._give_back, block, pinned)
            return array
        descriptor, path = tempfile.mkstemp(prefix="llm-barber-", suffix=".activations", dir=self.folder)
        try:
            # A full disk raises an error here, not a signal later, on systems with posix_fallocate (not macOS).
            getattr(os, "posix_fallocate", _enlarge)(descriptor, 0, max(1, size))
            return torch.from_file(path, shared=True, size=size // dtype.itemsize, dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(Path(path).parent)) from error
        finally:
            os.close(descriptor)
            os.unlink(path)  # it vanishes once it is not mapped any more, even if the process is killed

    def _give_back(self, block: int, pinned: bool) -> None:
        """Free the host memory of an array, or keep its pinned block as spare."""
        if pinned:
            self.spare[block] += 1
        else:
            self.used -= block

    def _give_back_room(self, size: int) -> None:
        """Add the bytes of an array that is gone to the device's room."""
        self.room = None if self.room is None else self.room + size


def _empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate pinned memory, or ordinary memory with a warning where the system refuses to pin it."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # CUDA's errors are of this class
        reason = first_line(error)
        warnings.warn(f"activations cannot be pinned, so the GPU waits for their copies: {reason}", stacklevel=3)
        return torch.empty(shape, dtype=dtype)


def _enlarge(descriptor: int, start: int, size: int) -> None:
    """Enlarge a file without reserving its blocks, where there is no posix_fallocate."""
    os.ftruncate(descriptor, start + size)


def block_size(size: int) -> int:
    """Bytes of pinned memory that PyTorch takes for an array of `size` bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
