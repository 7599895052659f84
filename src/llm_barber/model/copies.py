"""Copies between arrays in host memory and a GPU, beside what is computed: batches come early, results leave late."""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

UNDER_WAY = 2  # results that leave at a time
Copied = tuple[Tensor, torch.cuda.Event | None]


class Copier(Protocol):
    """Copies in the background."""

    def start(self, values: Tensor) -> Copied:
        """Begin to copy values of host memory to the device; beside what is computed, if they are pinned."""

    def wait(self, copied: Copied) -> Tensor:
        """The copy, whole for whatever is computed from now on."""

    def start_back(self, values: Tensor, place: Tensor) -> None:
        """Begin to copy values of the device to their place in host memory, once they are computed.

        They must not be changed before they are there.
        """

    def wait_back(self) -> None:
        """Return when all that was copied back is there."""


class SideStreams:
    """Copies on CUDA streams of their own, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[torch.cuda.Event] = deque()

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
            self._under_way.append(self._back.record_event())
        values.record_stream(self._back)
        if len(self._under_way) > UNDER_WAY:  # the process would run ahead, and results pile up on the device
            self._under_way.popleft().synchronize()

    def wait_back(self) -> None:
        """Let the process wait."""
        self._back.synchronize()
        self._under_way.clear()


class Copies:
    """Reads and writes batches of arrays, and guesses which is read next: as many rows, as far on as the last time."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._coming: dict[str, tuple[slice, Copied]] = {}
        self._leaving: dict[str, list[slice]] = {}
        self._latest: dict[str, tuple[slice, int]] = {}  # what was read, and how far on the next is taken to be

    def read(self, name: str, array: Tensor, batch: slice) -> Tensor:
        """A batch, on the device.

        Args:
            name: of the array.
            array: (sequences, …), in host memory.
            batch: which sequences, without gaps.
        """
        following = self._following(name, batch, len(array))
        self.settle(name, batch, following)
        rows, copied = self._coming.pop(name, (None, None))
        if copied is None or rows != batch:
            copied = self._copier.start(array[batch])
        if following.start < following.stop:
            self._coming[name] = following, self._copier.start(array[following])
        return self._copier.wait(copied)

    def _following(self, name: str, batch: slice, count: int) -> slice:
        size = batch.stop - batch.start
        latest, on = self._latest.get(name, (slice(0, 0), 0))
        if size != latest.stop - latest.start:
            on = size
        elif batch.start > latest.start:
            on = batch.start - latest.start
        self._latest[name] = batch, on
        start = batch.start + on
        return slice(min(start, count), min(start + size, count))

    def write(self, name: str, array: Tensor, batch: slice, values: Tensor) -> None:
        """Copy a batch to an array in host memory: it is there once the array has settled, and must not change before.

        Args:
            name: of the array.
            array: (sequences, …).
            batch: which sequences, without gaps.
            values: on the device; the array's dtype.
        """
        if name in self._coming and _overlap(self._coming[name][0], batch):
            del self._coming[name]
        self._leaving.setdefault(name, []).append(batch)
        self._copier.start_back(values, array[batch])

    def settle(self, name: str, *batches: slice) -> None:
        """Wait until the array, or these rows of it, are what was written to them."""
        leaving = self._leaving.get(name, [])
        if any(not batches or any(_overlap(one, batch) for batch in batches) for one in leaving):
            self._copier.wait_back()
            self._leaving.clear()

    def forget(self, name: str) -> None:
        """Let go of an array: it becomes another, or changes in another way."""
        self.settle(name)
        self._coming.pop(name, None)
        self._latest.pop(name, None)

    def forget_guesses(self) -> None:
        """Let go of what is on the device and not asked for yet."""
        self._coming.clear()


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)
