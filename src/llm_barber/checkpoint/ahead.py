"""Read the tensors of the next decoder layer while the present one is computed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor

from llm_barber.checkpoint.memory import ordinary_memory, pinned_memory
from llm_barber.checkpoint.source import CheckpointSource

Tensors = dict[str, Tensor]


class ReadAhead:
    """Reader of groups of tensors, one group ahead of its user; a context manager.

    It begins with the first `take`, or earlier with `begin`.

    Args:
        source: the checkpoint.
        groups: names of the tensors that are read together, in the order in which groups are taken.
        pinned: read into memory that a GPU can copy from while it computes.
        following: a reader that begins when this one has read its last group.
    """

    def __init__(
        self,
        source: CheckpointSource,
        groups: Sequence[list[str]],
        pinned: bool,
        following: "ReadAhead | None" = None,
    ) -> None:
        self._source, self._groups, self._pinned, self._following = source, list(groups), pinned, following
        self._next = 0
        self._pool = ThreadPoolExecutor(1, "read ahead")
        self._coming: Future[Tensors] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self) -> None:
        """Begin to read the first group, or, if there is none, let the following reader begin."""
        if self._next == 0:
            self._start()

    def take(self) -> Tensors:
        """Take the next group, by the checkpoint's names, and begin to read the group after it.

        Raises:
            ModelError: as `CheckpointSource.read`.
        """
        self.begin()
        assert self._coming is not None, "there are no more groups"
        tensors = self._coming.result()
        self._start()
        return tensors

    def _start(self) -> None:
        self._coming = None
        if self._next < len(self._groups):
            self._coming = self._pool.submit(self._read, self._groups[self._next])
            self._next += 1
        elif self._following is not None:
            self._following.begin()

    def _read(self, names: list[str]) -> Tensors:
        return self._source.read(names, pinned_memory if self._pinned else ordinary_memory)
