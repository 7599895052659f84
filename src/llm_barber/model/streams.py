"""The calibration activations, layer to layer: read and written in batches, one array a purpose.

`memory.py` says where arrays lie; batches of those that are not on the device are moved there, and back.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llm_barber.model.array_memory import ArrayMemory
from llm_barber.model.copies import Copies, SideStreams
from llm_barber.parallel.ranks import Ranks

HIDDEN = "hidden"  # the array with the input of the decoder layer that is next
TARGET = "target"  # the array with what the output of a layer that is tuned should be
NEXT = "next"  # the array that will be HIDDEN of the layer after this one
DENSE = "dense "  # before a name: the same in the dense model
DENSE_OUTPUT = "dense output"  # the block's output with dense weights on the sparse stream


class ActivationStreams:
    """Named arrays of shape (sequences, tokens, features): this process's share of the sequences.

    Args:
        all_sequences: calibration sequences of all processes.
        batch_size: sequences moved to the device together.
        memory: where arrays lie, and the device that batches are computed on.
        ranks: the processes.
        held_out: of all calibration sequences, the last ones. Those that are here come after `held_out_start` others.
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
        self._shares = self.ranks.shares(all_sequences, held_out)  # which of all are here
        self.held_out_start, held_out_here = (share.stop - share.start for share in self._shares)
        self.sequences = self.held_out_start + held_out_here
        self.batch_size = batch_size
        self.memory = memory or ArrayMemory()
        self.left_device = False  # for its memory was too small
        self._arrays: dict[str, Tensor] = {}
        self._copies = Copies(SideStreams(self.device)) if self.memory.pinned else None

    @property
    def device(self) -> torch.device:
        """Where batches are computed."""
        return self.memory.device

    def batches(self) -> Iterator[slice]:
        """The sequences of each batch; the last may be smaller."""
        yield from pieces(0, self.sequences, self.batch_size)

    def split(self) -> tuple[list[slice], list[slice]]:
        """Batches of the training sequences, and batches of the held-out sequences."""
        border = self.held_out_start
        return pieces(0, border, self.batch_size), pieces(border, self.sequences, self.batch_size)

    @property
    def first_sequence(self) -> int:
        """Which of all sequences the first one here is, if it is not held out."""
        return self._shares[0].start

    def select_local(self, tokens: Tensor) -> Tensor:
        """Of something for each of all sequences what belongs to those here, in their order."""
        return torch.cat([tokens[share] for share in self._shares])

    def count_among_first(self, count: int) -> int:
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
        return array[batch] if self._copies is None or _on_device(array) else self._copies.read(name, array, batch)

    def unpinned_copy(self, values: Tensor) -> Tensor:
        """A copy in an array of its own, which goes when nobody has it any more: pinned memory would stay."""
        return self.memory.empty_off_device(tuple(values.shape), values.dtype, pinned=False).copy_(values)

    def copy(self, name: str, other: str) -> None:
        """Give a copy of an array another name."""
        self._settle(name)
        self._put(other, self._copied(self._arrays[name]))

    def swap(self, name: str, other: str) -> None:
        """Exchange the names of two arrays; what was read by one name is then read, or overwritten, by the other.

        Raises:
            KeyError: either is not there.
        """
        first, second = self._arrays[name], self._arrays[other]
        self._put(name, second)
        self._put(other, first)

    def leave_device(self) -> None:
        """Take all arrays off the device, for good, as its memory is needed."""
        self.memory.room, self.left_device = None, True
        if self._copies is not None:
            self._copies.forget_guesses()
        for name, array in self._arrays.items():
            self._arrays[name] = self._off_device(array)

    @property
    def on_device(self) -> bool:
        """Do arrays stay on the device?"""
        return any(map(_on_device, self._arrays.values()))

    def drop(self, name: str) -> None:
        """Forget an array."""
        self._forget(name)
        del self._arrays[name]

    def between_layers(self) -> dict[str, Tensor]:
        """What the next layer starts from, in host memory."""
        names = [name for name in (HIDDEN, DENSE + HIDDEN) if name in self._arrays]
        for name in names:
            self._settle(name)
        return {name: self._off_device(self._arrays[name]) for name in names}

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
            array = self.memory.empty(shape, values.dtype)
            self._put(name, array)
        if self._copies is None or _on_device(array):
            array[batch] = values
        else:
            self._copies.write(name, array, batch, values)

    def _put(self, name: str, array: Tensor) -> None:
        self._forget(name)
        self._arrays[name] = array

    def _copied(self, values: Tensor) -> Tensor:
        return self.memory.empty(tuple(values.shape), values.dtype).copy_(values)

    def _off_device(self, array: Tensor) -> Tensor:
        if not _on_device(array):
            return array
        return self.memory.empty_off_device(tuple(array.shape), array.dtype).copy_(array)

    def _settle(self, name: str) -> None:
        if self._copies is not None:
            self._copies.settle(name)

    def _forget(self, name: str) -> None:
        if self._copies is not None:
            self._copies.forget(name)


def _on_device(array: Tensor) -> bool:
    return array.device.type != "cpu"


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Slices of a range, `size` each; the last may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
