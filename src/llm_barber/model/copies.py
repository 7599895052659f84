"""Copies between arrays in host memory and a GPU, beside what is computed: batches come early, results leave late."""

from typing import Protocol

import torch
from torch import Tensor

Copied = tuple[Tensor, torch.cuda.Event | None]


class Copier(Protocol):
    """Copies in the background."""

    def start(self, values: Tensor) -> Copied:
        """Begin to copy values that lie in pinned host memory to the device."""

    def wait(self, copied: Copied) -> Tensor:
        """The copy, whole for whatever is computed from now on."""

    def start_back(self, values: Tensor, place: Tensor) -> None:
        """Begin to copy values of the device to their place in host memory, once they are computed."""

    def wait_back(self) -> None:
        """Return when all that was copied back is there."""


class SideStreams:
    """Copies on CUDA streams of their own, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, values: Tensor) -> Copied:
        """Begin to copy. Nothing is waited for: whoever reads an array has waited for what was copied back to it."""
        with torch.cuda.stream(self._there):
            return values.to(self._device, non_blocking=True), self._there.record_event()

    def wait(self, copied: Copied) -> Tensor:
        """Let the present stream wait; the copy's memory is not reused before that stream is done with it."""
        values, done = copied
        assert done is not None
        present = torch.cuda.current_stream(self._device)
        present.wait_event(done)
        values.record_stream(present)
        return values

    def start_back(self, values: Tensor, place: Tensor) -> None:
        """Begin when the present stream has computed the values; their memory is not reused before they are copied."""
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            place.copy_(values, non_blocking=True)
        values.record_stream(self._back)

    def wait_back(self) -> None:
        """Let the process wait."""
        self._back.synchronize()


class Copies:
    """Reads and writes batches of arrays; of those that are read it guesses the next: as many rows, where one ends."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._coming: dict[str, tuple[slice, Copied]] = {}
        self._leaving: set[str] = set()  # names of arrays

    def read(self, name: str, array: Tensor, batch: slice) -> Tensor:
        """A batch, on the device.

        Args:
            name: of the array.
            array: (sequences, …), in host memory.
            batch: which sequences.
        """
        self.settle(name)
        rows, copied = self._coming.pop(name, (None, None))
        if copied is None or rows != batch:
            copied = self._copier.start(array[batch].contiguous())
        following = slice(batch.stop, min(2 * batch.stop - batch.start, len(array)))
        if batch.step is None and following.start < following.stop:
            self._coming[name] = following, self._copier.start(array[following])
        return self._copier.wait(copied)

    def write(self, name: str, array: Tensor, batch: slice, values: Tensor) -> None:
        """Copy a batch to an array in host memory; it is there once the array has settled."""
        rows = self._coming.get(name, (slice(0, 0), None))[0]
        if batch.start < rows.stop and rows.start < batch.stop:
            del self._coming[name]
        self._leaving.add(name)
        self._copier.start_back(values, array[batch])

    def settle(self, name: str) -> None:
        """Wait until the array is what was written to it."""
        if name in self._leaving:
            self._copier.wait_back()
            self._leaving.clear()

    def forget(self, name: str) -> None:
        """Let go of an array: it becomes another, or changes in another way."""
        self.settle(name)
        self._coming.pop(name, None)
