"""Several processes on one run: each has a share of the calibration sequences; sums are added up.

`torchrun` starts the processes, and sets their number in the environment. Sums are all-reduced, so that every process
ranks the same numbers and gets the same masks; process 0 writes. A single process, the usual case, has no group.

A process that dies closes its connections, which ends the operations of the others with an error; `torchrun` ends them,
too. A process that is silent ends them after `TIMEOUT`.
"""

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llm_barber.errors import BarberError, SettingsError, first_line

TIMEOUT = timedelta(hours=3)  # processes wait while one of them computes, or downloads a model
AnyObject = TypeVar("AnyObject")
Share: TypeAlias = "slice[int, int, None]"


class RankError(BarberError):
    """Another process of the run ended, or cannot be reached."""


class Sums(Protocol):
    """Sums over sequences (`masking/statistics.py`)."""

    def parts(self) -> list[Tensor]:
        """Tensors to add up over all processes; a single process would have counted these totals."""


@contextmanager
def _with_others() -> Iterator[None]:
    """Explain an operation of several processes that failed: torch.distributed raises these types."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"another process of the run has ended or cannot be reached: {first_line(error)}",
            "look for its message above; the run goes on with --resume, with any number of processes",
        ) from error


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    `rank`: this process's number. `count`: number of processes.
    """

    rank: int = 0
    count: int = 1

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

    def add(self, sums: Sums) -> None:
        """Add up sums over all processes, in place."""
        for part in sums.parts():
            self.add_tensor(part)

    def add_tensor(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.count > 1:
            with _with_others():
                dist.all_reduce(tensor)

    def total(self, *values: float) -> list[float]:
        """Add up numbers over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        self.add_tensor(sums)
        return [float(value) for value in sums]

    def from_first(self, value: AnyObject) -> AnyObject:
        """Return the value that process 0 passes."""
        box = [value]
        if self.count > 1:
            with _with_others():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, on the CPU, that process 0 passes."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.from_first({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            received[name] = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            with _with_others():
                dist.broadcast(received[name].reshape(-1).view(torch.uint8), 0)
        return received

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            with _with_others():
                dist.barrier()


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, or the group that the calling program has made.

    The group stays for further runs of the program.

    Raises:
        RankError: another process ended, or cannot be reached.
        SettingsError: the program's group cannot add up numbers of the CPU.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            yield Ranks()
            return
        _meet()
    if "cpu" not in dist.get_backend_config():
        raise SettingsError(
            f"the program's group of processes has no backend for the CPU, only {dist.get_backend_config()}",
            'make it by init_process_group("cpu:gloo,cuda:nccl")',
        )
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
        # Each process notices a failure. Process 0 has written its files: they are complete whatever happens to others.
        with suppress(RankError) if ranks.is_first else nullcontext():
            ranks.wait()
    except BaseException:
        atexit.unregister(_leave)  # the others may wait in an operation: leaving must not wait for them
        raise


def _meet() -> None:
    """Make the group of the processes that `torchrun` started.

    Raises:
        RankError: the processes do not find each other.
    """
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"the processes of the run do not find each other: {first_line(error)}"
        raise RankError(reason, "use torchrun") from error
    atexit.register(_leave)


def _leave() -> None:
    """Destroy the group, unless the program has done so."""
    if dist.is_initialized():
        dist.destroy_process_group()
