"""The next batch of an array, on its way to a GPU while the present one is computed with."""

from typing import Protocol

import torch
from torch import Tensor

Copied = tuple[Tensor, torch.cuda.Event | None]


class Copier(Protocol):
    """Copies to a device in the background."""

    def start(self, values: Tensor) -> Copied:
        """Begin to copy values that lie in pinned host memory."""

    def wait(self, copied: Copied) -> Tensor:
        """The copy, whole for whatever is computed from now on."""


class SideStream:
    """Copies on a CUDA stream of its own, beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, values: Tensor) -> Copied:
        """Begin to copy. Nothing is waited for: what was written to host memory was written before it returned."""
        with torch.cuda.stream(self._stream):
            return values.to(self._device, non_blocking=True), self._stream.record_event()

    def wait(self, copied: Copied) -> Tensor:
        """Let the present stream wait; the copy's memory is not reused before that stream is done with it."""
        values, done = copied
        assert done is not None
        present = torch.cuda.current_stream(self._device)
        present.wait_event(done)
        values.record_stream(present)
        return values


class BatchesAhead:
    """Reads batches of arrays, and guesses the next: as many rows, where this one ends."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._coming: dict[str, tuple[slice, Copied]] = {}

    def read(self, name: str, array: Tensor, batch: slice) -> Tensor:
        """A batch, on the device.

        Args:
            name: of the array.
            array: (sequences, …), in host memory.
            batch: which sequences.
        """
        rows, copied = self._coming.pop(name, (None, None))
        if copied is None or rows != batch:
            copied = self._copier.start(array[batch].contiguous())
        following = slice(batch.stop, min(2 * batch.stop - batch.start, len(array)))
        if batch.step is None and following.start < following.stop:
            self._coming[name] = following, self._copier.start(array[following])
        return self._copier.wait(copied)

    def forget(self, name: str, batch: slice | None = None) -> None:
        """Let go of what is coming of an array that changes, or of rows of it."""
        if name in self._coming:
            rows = self._coming[name][0]
            if batch is None or (batch.start < rows.stop and rows.start < batch.stop):
                del self._coming[name]
