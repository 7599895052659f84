"""Several processes on one run: each has a share of the calibration sequences, and what they count is added up.

Started by `torchrun`, which says in the environment how many there are. Sums are all-reduced, so that every process
ranks the same numbers and finds the same masks; process 0 writes. One process is the ordinary case, without a group.
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
from llm_barber.parallel.pulse import watched

# Others wait while one process computes, or fetches a model. One that died is noticed at once, by its connection; one
# that failed or vanished, by `pulse.py`.
TIMEOUT, MEETING = timedelta(days=2), timedelta(minutes=10)
LEAVING = 5.0  # seconds that leaving the group may take after a failure: NCCL may wait for the others then
AnyObject = TypeVar("AnyObject")
Share: TypeAlias = "slice[int, int, None]"
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # an array of a shape and dtype, of any content


class RankError(BarberError):
    """Another process of the run ended, or cannot be reached."""


class Sums(Protocol):
    """What is added up over sequences (`masking/statistics.py`)."""

    def parts(self) -> list[Tensor]:
        """Tensors whose sums over all processes are what one process would have counted."""


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and the group in which they talk; None: the program's usual one."""

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Is this the one that writes and talks?"""
        return self.rank == 0

    def shares(self, sequences: int, held_out: int) -> tuple[Share, Share]:
        """Which of all calibration sequences are this process's: before the last ones, that are held out, and of these.

        It has its part of both, so that none waits while others have more to do.

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

    def _places(self, sequences: int, held_out: int) -> Iterator[tuple[Share, Share]]:
        """Where each of the two lies among all sequences, and among this process's own; without empty ones."""
        start = 0
        for share in self.shares(sequences, held_out):
            stop = start + share.stop - share.start
            if start < stop:
                yield share, slice(start, stop)
            start = stop

    def add(self, sums: Sums) -> None:
        """Add up, in place, what each process has counted."""
        for part in sums.parts():
            self.add_tensor(part)

    def add_tensor(self, one: Tensor) -> None:
        """Add up a tensor, in place."""
        if self.count > 1:
            dist.all_reduce(one, group=self.group)

    def total(self, *values: float) -> list[float]:
        """The sums of numbers over all processes."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, group=self.group)
        return [float(value) for value in found]

    def from_first(self, value: AnyObject) -> AnyObject:
        """What process 0 has."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that process 0 has, of the CPU."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.from_first({name: (tuple(one.shape), one.dtype) for name, one in tensors.items()})
        found = {}
        for name, (shape, dtype) in kinds.items():
            found[name] = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(found[name].reshape(-1).view(torch.uint8), 0, self.group)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier(self.group)

    def gather(self, arrays: Mapping[str, Tensor], sequences: int, held_out: int, empty: Empty) -> dict[str, Tensor]:
        """On process 0 the arrays of all sequences, (sequences, …), from each process's own; elsewhere nothing.

        `empty` makes them.
        """
        if self.count == 1:
            return dict(arrays)
        found = {}
        for name, own in arrays.items():
            if not self.is_first:
                for _, here in self._places(sequences, held_out):
                    dist.send(own[here].contiguous(), 0, self.group)
                continue
            whole = empty((sequences, *own.shape[1:]), own.dtype)
            for rank in range(self.count):
                for there, here in Ranks(rank, self.count)._places(sequences, held_out):
                    if rank:
                        dist.recv(whole[there], rank, self.group)
                    else:
                        whole[there] = own[here]
            found[name] = whole
        return found

    def scatter(self, arrays: Mapping[str, Tensor], sequences: int, held_out: int, empty: Empty) -> dict[str, Tensor]:
        """Each process's own of process 0's arrays of all sequences; `empty` makes them."""
        if self.count == 1:
            return dict(arrays)
        kinds = self.from_first({name: (tuple(one.shape[1:]), one.dtype) for name, one in arrays.items()})
        found = {}
        for name, (shape, dtype) in kinds.items():
            places = list(self._places(sequences, held_out))
            found[name] = empty((places[-1][1].stop, *shape), dtype)
            for rank in range(1, self.count) if self.is_first else ():
                for there, _ in Ranks(rank, self.count)._places(sequences, held_out):
                    dist.send(arrays[name][there].contiguous(), rank, self.group)
            for there, here in places:
                if self.is_first:
                    found[name][here] = arrays[name][there]
                else:
                    dist.recv(found[name][here], 0, self.group)
        return found


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or the group that the calling program has made of them.

    Raises:
        RankError: another one ended, or cannot be reached.
        SettingsError: the program's group cannot add up numbers of the CPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() and _Group.own is None:
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
            # Whoever is done stays until all are, and a failure is missed nowhere; but what process 0 has written is
            # there, whatever becomes of the others.
            with suppress(RuntimeError) if ranks.is_first else nullcontext():
                ranks.wait()
    except BaseException as error:
        _Group.leave_after_failure()
        # As torch.distributed says what is wrong with a connection.
        of_connection = isinstance(error, RuntimeError | ValueError) and not isinstance(error, torch.OutOfMemoryError)
        if not of_connection or not _of_connection(error):
            raise
        raise RankError(
            f"another process of the run has ended or cannot be reached: {first_line(error)}",
            "look for its message above; the run goes on with --resume, with any number of processes",
        ) from error


class _Group:
    """The group that this module makes, for all runs of the program; after a failure another one, in the same store."""

    own: dist.ProcessGroup | None = None
    _met: tuple[Any, int, int] | None = None  # where, which process this is, and of how many
    _meetings = 0

    @classmethod
    def meet(cls) -> dist.ProcessGroup:
        if cls.own is not None:
            return cls.own
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            if cls._met is None:
                cls._met = next(rendezvous("env://", timeout=MEETING))
                atexit.register(cls.leave)
            every, rank, count = cls._met
            cls._meetings += 1
            store = PrefixStore(f"llm-barber/{cls._meetings}", every)  # where nothing of another group is left
            dist.init_process_group(backend, timeout=MEETING, store=store, rank=rank, world_size=count)
            group: Any = dist.new_group(backend=backend, timeout=TIMEOUT)
            every.set_timeout(TIMEOUT)  # NCCL's processes meet there at their first sum
        except (KeyError, RuntimeError, ValueError) as error:
            cls.leave()
            raise RankError(
                f"the processes of the run do not find each other: {first_line(error)}", "use torchrun"
            ) from error
        cls.own = group
        return cls.own

    @classmethod
    def leave(cls) -> None:
        cls.own = None
        if cls._met is not None and dist.is_initialized():
            dist.destroy_process_group()

    @classmethod
    def leave_after_failure(cls) -> None:
        """Leave, while the others may be in the middle of something that this process will not join."""
        cls.own = None
        leaving = Thread(target=cls.leave, daemon=True)
        leaving.start()
        leaving.join(LEAVING)
        if leaving.is_alive():
            atexit.unregister(cls.leave)


def _of_connection(error: Any) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection", "store"))
