"""Copies between host memory and a GPU while it computes: batches come early, results leave late."""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

COPIES_BACK = 2  # results that are copied back at a time
READS_AHEAD = 4  # batches of arrays that the process may have read before the device has come to them
Copied = tuple[Tensor, torch.cuda.Event | None]


class Copier(Protocol):
    """Copies in the background."""

    def start(self, values: Tensor) -> Copied:
        """Start a copy of values in host memory to the device, which computes meanwhile if they are pinned."""

    def wait(self, copied: Copied) -> Tensor:
        """Values of a copy; computations that start from now on see it complete."""

    def start_back(self, values: Tensor, target: Tensor) -> None:
        """Start a copy of values on the device, once they are computed, to `target` in host memory.

        The values must not be changed before the copy is complete.
        """

    def wait_back(self) -> None:
        """Wait until all copies to host memory are complete."""


class SideStreams:
    """Copies on two CUDA streams, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to_device = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_host = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[torch.cuda.Event] = deque()
        self._reads: deque[torch.cuda.Event] = deque()

    def start(self, values: Tensor) -> Copied:
        """Start a copy. It waits for nothing: the reader of an array has waited for copies back to it."""
        with torch.cuda.stream(self._to_device):
            return values.to(self._device, non_blocking=True), self._to_device.record_event()

    def wait(self, copied: Copied) -> Tensor:
        """Let the present stream wait; the copy's memory is not reused before that stream has used it.

        A process that is far ahead of the device waits for it: otherwise batches pile up there.
        """
        values, done = copied
        assert done is not None
        present = torch.cuda.current_stream(self._device)
        present.wait_event(done)
        values.record_stream(present)
        self._reads.append(present.record_event())
        if len(self._reads) > READS_AHEAD:
            self._reads.popleft().synchronize()
        return values

    def start_back(self, values: Tensor, target: Tensor) -> None:
        """Start once the present stream has computed the values; their memory is not reused before the copy."""
        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host):
            target.copy_(values, non_blocking=True)
            self._under_way.append(self._to_host.record_event())
        values.record_stream(self._to_host)
        if len(self._under_way) > COPIES_BACK:  # otherwise the process runs ahead, and results pile up on the device
            self._under_way.popleft().synchronize()

    def wait_back(self) -> None:
        """Let the process wait for all copies back."""
        self._to_host.synchronize()
        self._under_way.clear()


class Copies:
    """Reads and writes batches of arrays, and reads ahead the batch that is likely next.

    The next batch is taken to have as many rows as the last batch, and to follow it at the same distance as that
    batch followed the one before.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._coming: dict[str, tuple[slice, Copied]] = {}
        self._leaving: dict[str, list[slice]] = {}
        self._latest: dict[str, tuple[slice, int]] = {}  # the last batch, and the distance to the next one

    def read(self, name: str, array: Tensor, batch: slice) -> Tensor:
        """Read a batch to the device.

        Args:
            name: the array's name.
            array: (sequences, …), in host memory.
            batch: the sequences, without gaps.
        """
        following = self._note_and_guess_next(name, batch, len(array))
        self.settle(name, batch, following)
        rows, copied = self._coming.pop(name, (None, None))
        if copied is None or rows != batch:
            copied = self._copier.start(array[batch])
        if following.start < following.stop:
            self._coming[name] = following, self._copier.start(array[following])
        return self._copier.wait(copied)

    def _note_and_guess_next(self, name: str, batch: slice, count: int) -> slice:
        """Note that `batch` is read, and guess the batch that follows it in an array of `count` sequences."""
        size = batch.stop - batch.start
        latest, distance = self._latest.get(name, (slice(0, 0), 0))
        if size != latest.stop - latest.start:
            distance = size
        elif batch.start > latest.start:
            distance = batch.start - latest.start
        self._latest[name] = batch, distance
        start = batch.start + distance
        return slice(min(start, count), min(start + size, count))

    def write(self, name: str, array: Tensor, batch: slice, values: Tensor) -> None:
        """Start to copy a batch to an array in host memory; `settle` waits until the copy is complete.

        Args:
            name: the array's name.
            array: (sequences, …), in host memory.
            batch: the sequences, without gaps.
            values: the batch on the device, in the array's dtype; they must not change before the copy is complete.
        """
        if name in self._coming and _overlap(self._coming[name][0], batch):
            del self._coming[name]
        self._leaving.setdefault(name, []).append(batch)
        self._copier.start_back(values, array[batch])

    def settle(self, name: str, *batches: slice) -> None:
        """Wait until all that was written to the array, or to these batches of it, is in host memory."""
        leaving = self._leaving.get(name, [])
        if any(not batches or any(_overlap(written, batch) for batch in batches) for written in leaving):
            self._copier.wait_back()
            self._leaving.clear()

    def forget(self, name: str) -> None:
        """Forget an array, which is replaced or changed otherwise; wait for what was written to it."""
        self.settle(name)
        self._coming.pop(name, None)
        self._latest.pop(name, None)

    def forget_guesses(self) -> None:
        """Free the batches on the device that were read ahead."""
        self._coming.clear()


def _overlap(first: slice, second: slice) -> bool:
    return bool(first.start < second.stop and second.start < first.stop)
