"""Where arrays of calibration activations lie: on the device, in host memory, or in files that are mapped into it."""

import os
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass
class ArrayMemory:
    """Gives arrays a place: on the device as far as there is room, then in memory up to `limit`, then in `folder`.

    Args:
        device: which computes.
        room: bytes that arrays may take of its memory, what is left of them; None: they may not any more. A CPU's is
            host memory: None.
        limit: bytes that they may take of host memory together, None: any number. Others are files.
        folder: where these lie.
        used: bytes in host memory of arrays that are still there. Blocks of pinned memory are kept for later arrays,
            when theirs are not there any more: these are `spare`, by size, and still used.
    """

    device: torch.device = CPU
    room: int | None = None
    limit: int | None = None
    folder: Path | None = None
    used: int = 0
    spare: Counter[int] = field(default_factory=Counter)

    @property
    def pinned(self) -> bool:
        """Do arrays in memory lie where the device can copy from, and to, while it computes?"""
        return self.device.type != "cpu"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array of any content that is computed with: on the device, if there is room.

        Raises:
            OSError: as of `empty_off_device`.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.room is None or size > self.room:
            return self.empty_off_device(shape, dtype)
        try:
            array = torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:  # the device has less memory than `room` said
            self.room = None
            return self.empty_off_device(shape, dtype)
        self.room -= size
        weakref.finalize(array, self._give_back_room, size)
        return array

    def empty_off_device(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool | None = None) -> Tensor:
        """An array of any content in host memory or a file; `pinned`: None: if there is a device that copies from it.

        Raises:
            OSError: it has to be a file, and the disk of the folder that it names is full.
        """
        pinned = self.pinned if pinned is None else pinned
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = block_size(size) if pinned else size
        spare = pinned and self.spare[taken] > 0
        if self.limit is None or spare or self.used + taken <= self.limit:
            if spare:
                self.spare[taken] -= 1
            else:
                self.used += taken
            array = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            weakref.finalize(array, self._give_back, taken, pinned)
            return array
        descriptor, path = tempfile.mkstemp(prefix="llm-barber-", suffix=".activations", dir=self.folder)
        try:
            # A full disk is said here, not by a signal later; by systems that can (not macOS).
            getattr(os, "posix_fallocate", _enlarge)(descriptor, 0, max(1, size))
            return torch.from_file(path, shared=True, size=size // dtype.itemsize, dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(Path(path).parent)) from error
        finally:
            os.close(descriptor)
            os.unlink(path)  # it goes when it is not mapped any more, even if the process is killed

    def _give_back(self, taken: int, pinned: bool) -> None:
        if pinned:
            self.spare[taken] += 1
        else:
            self.used -= taken

    def _give_back_room(self, size: int) -> None:
        self.room = None if self.room is None else self.room + size


def _enlarge(descriptor: int, start: int, size: int) -> None:
    os.ftruncate(descriptor, start + size)


def block_size(size: int) -> int:
    """Bytes of pinned memory that PyTorch takes for an array of so many: a power of two."""
    return 1 << max(0, size - 1).bit_length()
