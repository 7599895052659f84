"""Calibration activations from layer to layer: named arrays that are read and written in batches.

An array lies on the device, in host memory, or in a mapped file. A batch of an array that is not on the device is
copied there, and back.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_barber.parallel.ranks import Ranks

# Names of arrays.
HIDDEN = "hidden"  # input of the present decoder layer
TARGET = "target"  # target of the output of a layer that is tuned
NEXT = "next"  # input of the next decoder layer
DENSE = "dense "  # prefix of a name: the same activations in the dense model
# The block's output with dense weights on the sparse stream. After the last block it is not needed any more: the array
# then takes the pruned layer's output, which `move_on` makes the next layer's input.
DENSE_OUTPUT = "dense output"
CPU = torch.device("cpu")


@dataclass
class ArrayMemory:
    """Allocates arrays: on the device if `on_device`, otherwise in host memory up to `limit`, then in `folder`.

    Args:
        device: the device that computes.
        on_device: whether arrays lie on the device.
        limit: bytes of host memory that all arrays together may take; None: no limit. Further arrays are files.
        folder: the folder of the files; None: that of temporary files.
        used: bytes of host memory that arrays take.
    """

    device: torch.device = CPU
    on_device: bool = False
    limit: int | None = None
    folder: Path | None = None
    used: int = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate an array without initialising it.

        Raises:
            OSError: as `empty_off_device`.
        """
        if self.on_device:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return self.empty_off_device(shape, dtype)

    def empty_off_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate an array in host memory or a file, without initialising it.

        Raises:
            OSError: the array has to be a file, and the disk is full; the error names the folder.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.limit is None or self.used + size <= self.limit:
            array = torch.empty(shape, dtype=dtype, device=CPU)
            self.used += size
            weakref.finalize(array, self._give_back, size)
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

    def _give_back(self, size: int) -> None:
        """Count the bytes of an array that is gone as free."""
        self.used -= size


def _enlarge(descriptor: int, start: int, size: int) -> None:
    """Enlarge a file without reserving its blocks, where there is no posix_fallocate."""
    os.ftruncate(descriptor, start + size)


class ActivationStreams:
    """Named arrays (sequences, tokens, features) with the activations of this process's sequences.

    The process's training sequences come first, then, from `held_out_start` on, its held-out sequences.

    Args:
        all_sequences: number of calibration sequences in all processes.
        batch_size: number of sequences that are moved to the device together.
        memory: allocates arrays, and names the device that computes batches.
        ranks: the processes.
        held_out: number of held-out sequences in all processes; they are the last of all sequences.
    """

    def __init__(
        self,
        all_sequences: int,
        batch_size: int,
        memory: ArrayMemory | None = None,
        ranks: Ranks | None = None,
        held_out: int = 0,
    ) -> None:
        self.all_sequences = all_sequences
        self.ranks = ranks or Ranks()
        self.held_out = held_out
        self._shares = self.ranks.shares(all_sequences, held_out)  # this process's part of all sequences
        self.held_out_start, held_out_here = (share.stop - share.start for share in self._shares)
        self.sequences = self.held_out_start + held_out_here
        self.batch_size = batch_size
        self.memory = memory or ArrayMemory()
        self._arrays: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device that computes batches."""
        return self.memory.device

    def batches(self) -> Iterator[slice]:
        """Sequences of each batch; the last batch may be smaller."""
        yield from pieces(0, self.sequences, self.batch_size)

    def split(self) -> tuple[list[slice], list[slice]]:
        """Batches of the training sequences, and batches of the held-out sequences."""
        border = self.held_out_start
        return pieces(0, border, self.batch_size), pieces(border, self.sequences, self.batch_size)

    @property
    def first_sequence(self) -> int:
        """Index among all sequences of this process's first training sequence."""
        return self._shares[0].start

    def select_local(self, values: Tensor) -> Tensor:
        """Select this process's sequences, in their order, from values of all sequences, (all sequences, …)."""
        return torch.cat([values[share] for share in self._shares])

    def count_among_first(self, count: int) -> int:
        """Number of this process's sequences among the first `count` of all; they are its first sequences."""
        return sum(max(0, min(share.stop, count) - share.start) for share in self._shares)

    def read(self, name: str, batch: slice) -> Tensor:
        """Read a batch to the device."""
        return self._arrays[name][batch].to(self.device)

    def copy_off_device(self, values: Tensor) -> Tensor:
        """Copy values to host memory or a file."""
        return self.memory.empty_off_device(tuple(values.shape), values.dtype).copy_(values)

    def copy(self, name: str, new_name: str) -> None:
        """Copy an array under another name."""
        self._arrays[new_name] = self._copied(self._arrays[name])

    def swap(self, first: str, second: str) -> None:
        """Exchange the names of two arrays: each is then read, and overwritten, under the other's name.

        Raises:
            KeyError: there is no array of that name.
        """
        self._arrays[first], self._arrays[second] = self._arrays[second], self._arrays[first]

    def drop(self, name: str) -> None:
        """Free an array."""
        del self._arrays[name]

    def write(self, name: str, batch: slice, values: Tensor) -> None:
        """Write a batch; its array is allocated at the first batch and reused by later layers."""
        shape = (self.sequences, *values.shape[1:])
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != values.dtype:
            array = self._arrays[name] = self.memory.empty(shape, values.dtype)
        array[batch] = values

    def _copied(self, values: Tensor) -> Tensor:
        return self.memory.empty(tuple(values.shape), values.dtype).copy_(values)


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Slices of a range, `size` long; the last may be shorter."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
