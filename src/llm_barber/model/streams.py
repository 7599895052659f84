"""The calibration activations, layer to layer: kept off the device, moved in batches, one array a purpose.

Arrays lie in host memory, as far as that is allowed, and beyond in files that are mapped into memory.
"""

import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llm_barber.model.copies import Copies, SideStreams
from llm_barber.ranks import Ranks

HIDDEN = "hidden"  # the array with the input of the decoder layer that is next
NEXT = "next"  # the array that will be HIDDEN of the layer after this one
DENSE = "dense "  # before a name: the same in the dense model
DENSE_OUTPUT = "dense output"  # the block's output with dense weights on the sparse stream


@dataclass
class HostMemory:
    """Arrays in memory while together they take at most `limit` bytes (None: any number), else in files in `folder`.

    `used`: bytes of those in memory that are still there. Blocks of pinned memory are kept for later arrays, when
    theirs are not there any more: these are `spare`, by size, and still used.
    """

    limit: int | None = None
    folder: Path | None = None
    used: int = 0
    spare: Counter[int] = field(default_factory=Counter)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """An array of any content.

        Raises:
            OSError: it has to be a file, and the disk is full.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = block_size(size) if pinned else size
        if self.limit is None or self.spare[taken] or self.used + taken <= self.limit:
            if self.spare[taken]:
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
        finally:
            os.close(descriptor)
            os.unlink(path)  # it goes when it is not mapped any more, even if the process is killed

    def _give_back(self, taken: int, pinned: bool) -> None:
        if pinned:
            self.spare[taken] += 1
        else:
            self.used -= taken


class ActivationStreams:
    """Named arrays of shape (sequences, tokens, features) in host memory: this process's share of the sequences.

    Args:
        every: calibration sequences of all processes.
        batch_size: sequences moved to the device together.
        device: where batches go.
        ranks: the processes.
        memory: where arrays lie.
        held_out: of all calibration sequences, the last ones. Those that are here come after `border` others.
    """

    def __init__(
        self,
        every: int,
        batch_size: int,
        device: torch.device,
        ranks: Ranks | None = None,
        memory: HostMemory | None = None,
        held_out: int = 0,
    ) -> None:
        self.every = every
        self.ranks = ranks or Ranks()
        self.held_out = held_out
        self._shares = self.ranks.shares(every, held_out)  # which of all are here
        self.border, own_held_out = (share.stop - share.start for share in self._shares)
        self.sequences = self.border + own_held_out
        self.batch_size = batch_size
        self.device = device
        self._memory = memory or HostMemory()
        self._arrays: dict[str, Tensor] = {}
        self._copies = Copies(SideStreams(device)) if self.pinned else None

    @property
    def pinned(self) -> bool:
        """Do arrays in memory lie where the device can copy from, and to, while it computes?"""
        return self.device.type != "cpu"

    def batches(self) -> Iterator[slice]:
        """The sequences of each batch; the last may be smaller."""
        yield from pieces(0, self.sequences, self.batch_size)

    def split(self) -> tuple[list[slice], list[slice]]:
        """The batches without the sequences that are held out, and those of the latter."""
        return pieces(0, self.border, self.batch_size), pieces(self.border, self.sequences, self.batch_size)

    @property
    def first(self) -> int:
        """Which of all sequences the first one here is, if it is not held out."""
        return self._shares[0].start

    def own(self, tokens: Tensor) -> Tensor:
        """Of something for each of all sequences what belongs to those here, in their order."""
        return torch.cat([tokens[share] for share in self._shares])

    def among_first(self, count: int) -> int:
        """How many of so many of all sequences, the first ones, are here; they are the first ones here, too."""
        return sum(max(0, min(share.stop, count) - share.start) for share in self._shares)

    def halve_batches(self) -> None:
        """From now on half as many sequences together; the device is given back what was on its way."""
        self.batch_size //= 2
        if self._copies is not None:
            self._copies.forget_guesses()

    def read(self, name: str, batch: slice) -> Tensor:
        """A batch, on the device; the next one is already on its way."""
        array = self._arrays[name]
        if self._copies is not None:
            return self._copies.read(name, array, batch)
        return array[batch].to(self.device)

    def kept(self, values: Tensor) -> Tensor:
        """A copy in an array of its own, which goes when nobody has it any more: pinned memory would stay."""
        return self._memory.empty(tuple(values.shape), values.dtype).copy_(values)

    def copy(self, name: str, other: str) -> None:
        """Give a copy of an array another name."""
        self._settle(name)
        self._put(other, self._copied(self._arrays[name]))

    def rename(self, old: str, new: str) -> None:
        """Give an array another's name, and its place to the other."""
        present = self._arrays[old]
        self._put(old, self._arrays.get(new, present))
        self._put(new, present)

    def drop(self, name: str) -> None:
        """Forget an array."""
        self._forget(name)
        del self._arrays[name]

    def between_layers(self) -> dict[str, Tensor]:
        """What the next layer starts from."""
        names = [name for name in (HIDDEN, DENSE + HIDDEN) if name in self._arrays]
        for name in names:
            self._settle(name)
        return {name: self._arrays[name] for name in names}

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Put back what `between_layers` gave."""
        for name, values in arrays.items():
            self._put(name, self._copied(values))

    def write(self, name: str, batch: slice, values: Tensor) -> None:
        """Keep a batch; the array is made at the first one and reused by every later layer.

        On a GPU the values must not be changed afterwards: they are copied while something else is computed.
        """
        shape = (self.sequences, *values.shape[1:])
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != values.dtype:
            array = self.empty(shape, values.dtype)
            self._put(name, array)
        if self._copies is not None:
            self._copies.write(name, array, batch, values)
        else:
            array[batch] = values

    def _put(self, name: str, array: Tensor) -> None:
        self._forget(name)
        self._arrays[name] = array

    def _copied(self, values: Tensor) -> Tensor:
        return self.empty(tuple(values.shape), values.dtype).copy_(values)

    def _settle(self, name: str) -> None:
        if self._copies is not None:
            self._copies.settle(name)

    def _forget(self, name: str) -> None:
        if self._copies is not None:
            self._copies.forget(name)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array of any content, where arrays lie."""
        return self._memory.empty(shape, dtype, self.pinned)


def _enlarge(descriptor: int, start: int, size: int) -> None:
    os.ftruncate(descriptor, start + size)


def block_size(size: int) -> int:
    """Bytes of pinned memory that PyTorch takes for an array of so many: a power of two."""
    return 1 << max(0, size - 1).bit_length()


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Slices of a range, `size` each; the last may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
