"""The calibration activations, layer to layer: kept off the device, moved in batches, one array a purpose."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llm_barber.ranks import Ranks

HIDDEN = "hidden"  # the array with the input of the decoder layer that is next
NEXT = "next"  # the array that will be HIDDEN of the layer after this one
DENSE = "dense "  # before a name: the same in the dense model
DENSE_OUTPUT = "dense output"  # the block's output with dense weights on the sparse stream


class ActivationStreams:
    """Named arrays of shape (sequences, tokens, features) in host memory: this process's share of the sequences.

    Args:
        every: calibration sequences of all processes.
        batch_size: sequences moved to the device together.
        device: where batches go.
        ranks: the processes.
    """

    def __init__(self, every: int, batch_size: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.every = every
        self.ranks = ranks or Ranks()
        share = self.ranks.share(every)
        self.first, self.sequences = share.start, share.stop - share.start  # which of all are here, and how many
        self.batch_size = batch_size
        self.device = device
        self._arrays: dict[str, Tensor] = {}

    def batches(self) -> Iterator[slice]:
        """The sequences of each batch; the last may be smaller."""
        yield from pieces(0, self.sequences, self.batch_size)

    def split(self, held_out: int) -> tuple[list[slice], list[slice]]:
        """The batches without the last of all sequences that are held out, and those of the latter."""
        border = self.border(held_out)
        return pieces(0, border, self.batch_size), pieces(border, self.sequences, self.batch_size)

    def border(self, held_out: int) -> int:
        """How many sequences come before the last of all that are held out."""
        return min(max(self.every - held_out - self.first, 0), self.sequences)

    def of_all(self, batch: slice) -> slice:
        """Which of all processes' sequences a batch is."""
        return slice(self.first + batch.start, self.first + batch.stop)

    def read(self, name: str, batch: slice) -> Tensor:
        """A batch, on the device."""
        return self._arrays[name][batch].to(self.device, non_blocking=True)

    def copied(self, name: str, batch: slice) -> Tensor:
        """A copy of a batch, in host memory."""
        return self._arrays[name][batch].clone()

    def copy(self, name: str, other: str) -> None:
        """Give a copy of an array another name."""
        self._arrays[other] = self._arrays[name].clone()

    def rename(self, old: str, new: str) -> None:
        """Give an array another's name, and its place to the other."""
        self._arrays[new], self._arrays[old] = self._arrays[old], self._arrays.get(new, self._arrays[old])

    def drop(self, name: str) -> None:
        """Forget an array."""
        del self._arrays[name]

    def between_layers(self) -> dict[str, Tensor]:
        """What the next layer starts from."""
        names = (HIDDEN, DENSE + HIDDEN)
        return {name: self._arrays[name] for name in names if name in self._arrays}

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Put back what `between_layers` gave."""
        self._arrays.update(arrays)

    def write(self, name: str, batch: slice, values: Tensor) -> None:
        """Keep a batch; the array is made at the first one and reused by every later layer."""
        shape = (self.sequences, *values.shape[1:])
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != values.dtype:
            array = self._arrays[name] = torch.empty(shape, dtype=values.dtype)
        array[batch] = values


def pieces(start: int, stop: int, size: int) -> list[slice]:
    """Slices of a range, `size` each; the last may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
