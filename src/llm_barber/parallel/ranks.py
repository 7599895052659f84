"""Several processes on one run: each has a share of the calibration sequences; sums are added up.

`torchrun` starts the processes, and sets their number in the environment. Sums are all-reduced, so that every process
ranks the same numbers and gets the same masks; process 0 writes. A single process, the usual case, has no group.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, not in its __all__

from llm_barber.errors import BarberError, SettingsError, first_line
from llm_barber.parallel.pulse import attempt, watched

# Processes wait while one of them computes, or downloads a model. A closed connection shows at once that a process
# died; `pulse.py` notices a process that failed or vanished.
TIMEOUT, MEETING = timedelta(days=2), timedelta(minutes=10)
LEAVING = 5.0  # seconds that leaving the group may take after a failure, when NCCL may wait for other processes
AnyObject = TypeVar("AnyObject")
Share: TypeAlias = "slice[int, int, None]"
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # allocates an array, without initialising it


class RankError(BarberError):
    """Another process of the run ended, or cannot be reached."""


class Sums(Protocol):
    """Sums over sequences (`masking/statistics.py`)."""

    def parts(self) -> list[Tensor]:
        """Tensors to add up over all processes; a single process would have counted these totals."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: this process's number.
        count: number of processes.
        group: the group in which they communicate; None: the program's default group.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """True in process 0, which writes files and messages."""
        return self.rank == 0

    def shares(self, sequences: int, held_out: int) -> tuple[Share, Share]:
        """Choose this process's calibration sequences: training sequences, and held-out sequences.

        The held-out sequences are the last of all. Every process has a share of both, so that processes finish
        together.

        Raises:
            SettingsError: there are more processes than sequences.
        """
        if sequences < self.count:
            raise SettingsError(
                f"{self.count} processes for {sequences} calibration windows", "start fewer, or give more --samples"
            )
        ends = [sequences * rank // self.count for rank in (self.rank, self.rank + 1)]
        last = [end * held_out // sequences for end in ends]
        first = sequences - held_out
        return slice(ends[0] - last[0], ends[1] - last[1]), slice(first + last[0], first + last[1])

    def _share_slices(self, sequences: int, held_out: int) -> Iterator[tuple[Share, Share]]:
        """Slices of each share that is not empty, among all sequences and among this process's sequences."""
        start = 0
        for share in self.shares(sequences, held_out):
            stop = start + share.stop - share.start
            if start < stop:
                yield share, slice(start, stop)
            start = stop

    def add(self, sums: Sums) -> None:
        """Add up sums over all processes, in place."""
        for part in sums.parts():
            self.add_tensor(part)

    def add_tensor(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)

    def total(self, *values: float) -> list[float]:
        """Add up numbers over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.group)
        return [float(value) for value in sums]

    def from_first(self, value: AnyObject) -> AnyObject:
        """Return the value that process 0 passes."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, on the CPU, that process 0 passes."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.from_first({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            received[name] = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(received[name].reshape(-1).view(torch.uint8), 0, self.group)
        return received

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier(self.group)

    def gather(self, arrays: Mapping[str, Tensor], sequences: int, held_out: int, empty: Empty) -> dict[str, Tensor]:
        """Join the arrays of all processes on process 0; other processes get an empty mapping.

        Args:
            arrays: this process's part of each array, (its sequences, …).
            sequences: number of sequences of all processes.
            held_out: number of held-out sequences of all processes.
            empty: allocates the joined arrays, (sequences, …).
        """
        if self.count == 1:
            return dict(arrays)
        joined_arrays = {}
        for name, part in arrays.items():
            if not self.is_first:
                for _, in_part in self._share_slices(sequences, held_out):
                    dist.send(part[in_part].contiguous(), 0, self.group)
                continue
            whole = empty((sequences, *part.shape[1:]), part.dtype)
            for rank in range(self.count):
                for in_whole, in_part in Ranks(rank, self.count)._share_slices(sequences, held_out):
                    if rank:
                        dist.recv(whole[in_whole], rank, self.group)
                    else:
                        whole[in_whole] = part[in_part]
            joined_arrays[name] = whole
        return joined_arrays

    def scatter(self, arrays: Mapping[str, Tensor], sequences: int, held_out: int, empty: Empty) -> dict[str, Tensor]:
        """Split process 0's arrays of all sequences over the processes; arguments as of `gather`."""
        if self.count == 1:
            return dict(arrays)
        kinds = self.from_first({name: (tuple(array.shape[1:]), array.dtype) for name, array in arrays.items()})
        parts = {}
        for name, (shape, dtype) in kinds.items():
            slices = list(self._share_slices(sequences, held_out))
            parts[name] = empty((slices[-1][1].stop, *shape), dtype)
            for rank in range(1, self.count) if self.is_first else ():
                for in_whole, _ in Ranks(rank, self.count)._share_slices(sequences, held_out):
                    dist.send(arrays[name][in_whole].contiguous(), rank, self.group)
            for in_whole, in_part in slices:
                if self.is_first:
                    parts[name][in_part] = arrays[name][in_whole]
                else:
                    dist.recv(parts[name][in_part], 0, self.group)
        return parts


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or the group that the calling program has made.

    Raises:
        RankError: another process ended, or cannot be reached.
        SettingsError: the program's group cannot add up numbers of the CPU.
    """
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if dist.is_initialized() and _Group.group is None:
        if "cpu" not in dist.get_backend_config():
            raise SettingsError(
                f"the program's group of processes has no backend for the CPU, only {dist.get_backend_config()}",
                'make it by init_process_group("cpu:gloo,cuda:nccl")',
            )
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if count == 1:
        yield Ranks()
        return
    group = _Group.meet()
    ranks = Ranks(dist.get_rank(), count, group)
    try:
        with watched(ranks.rank, count):
            yield ranks
            # A process that is done waits for all, so that each notices a failure. Process 0 has written its files:
            # they are complete whatever happens to other processes.
            with suppress(RuntimeError) if ranks.is_first else nullcontext():
                ranks.wait()
    except BaseException as error:
        _Group.leave_after_failure()
        # torch.distributed raises these types for a broken connection.
        of_connection = isinstance(error, RuntimeError | ValueError) and not isinstance(error, torch.OutOfMemoryError)
        if not of_connection or not _of_connection(error):
            raise
        raise RankError(
            f"another process of the run has ended or cannot be reached: {first_line(error)}",
            "look for its message above; the run goes on with --resume, with any number of processes",
        ) from error


class _Group:
    """Group of this module for all runs of the program; after a failure a new one, in the same store."""

    group: dist.ProcessGroup | None = None
    _met: tuple[Any, int, int] | None = None  # the store, this process's number, and the number of processes
    _meetings = 0

    @classmethod
    def meet(cls) -> dist.ProcessGroup:
        """Return the group; make it if there is none."""
        if cls.group is not None:
            return cls.group
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            if cls._met is None:
                cls._met = next(rendezvous("env://", timeout=MEETING))
                atexit.register(cls.leave)
            root, rank, count = cls._met
            cls._meetings += 1
            store = PrefixStore(f"llm-barber/{attempt()}/{cls._meetings}", root)  # without keys of an earlier group
            dist.init_process_group(backend, timeout=MEETING, store=store, rank=rank, world_size=count)
            group: Any = dist.new_group(backend=backend, timeout=TIMEOUT)
            root.set_timeout(TIMEOUT)  # NCCL's processes meet there at their first sum
        except (KeyError, RuntimeError, ValueError) as error:
            cls.leave()
            raise RankError(
                f"the processes of the run do not find each other: {first_line(error)}", "use torchrun"
            ) from error
        cls.group = group
        return cls.group

    @classmethod
    def leave(cls) -> None:
        """Destroy the group."""
        cls.group = None
        if cls._met is not None and dist.is_initialized():
            dist.destroy_process_group()

    @classmethod
    def leave_after_failure(cls) -> None:
        """Leave while other processes may wait in an operation that this process will not join."""
        cls.group = None
        leaving = Thread(target=cls.leave, daemon=True)
        leaving.start()
        leaving.join(LEAVING)
        if leaving.is_alive():
            atexit.unregister(cls.leave)


def _of_connection(error: Any) -> bool:
    """Test whether an error's text is about a connection."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection", "store"))
