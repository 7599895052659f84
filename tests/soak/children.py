"""Run something in a process of its own, which may be killed at a file operation, and say how it ended."""

import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_barber.errors import BarberError
from tests.conftest import Listener

KILLED = 9
LONGEST = 120  # seconds


class Fault(Exception):
    """A promise that was broken."""


@dataclass(frozen=True)
class Outcome:
    """The end of a process: `done`, `refused` (an error that a user can mend), `killed`, `defect` or `hung`."""

    kind: str
    words: str = ""
    warnings: list[str] = field(default_factory=list)
    value: Any = None

    @property
    def done(self) -> bool:
        """Did it come to its end?"""
        return self.kind == "done"


def run(function: Callable[[Listener], Any], kill_at: int | None = None) -> Outcome:
    """Call a function in a forked process.

    Args:
        function: called with a listener for warnings.
        kill_at: die, as by kill -9, just before the file operation (fsync, rename, unlink) of this number, from 1.

    Raises:
        Fault: the process hung, or ended by an error that is no message for a user.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _call(function, kill_at, writing)
    os.close(writing)
    answer, deadline = b"", time.monotonic() + LONGEST
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(reading, 2**16)
        if not part:
            break
        answer += part
    os.close(reading)
    os.waitpid(child, 0)
    outcome: Outcome = pickle.loads(answer) if answer else Outcome("hung" if not ready else "killed")
    if outcome.kind in ("hung", "defect") or (outcome.kind == "killed" and kill_at is None):
        raise Fault(f"{outcome.kind}: {outcome.words}")
    return outcome


def _call(function: Callable[[Listener], Any], kill_at: int | None, writing: int) -> None:
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if kill_at is not None:
        die_at(kill_at)
    listener = Listener()
    try:
        value = function(listener)
        outcome = Outcome("done", warnings=listener.warnings, value=value)
    except BarberError as error:
        outcome = Outcome("refused", f"{error} ({error.hint})", listener.warnings)
    except BaseException:
        outcome = Outcome("defect", traceback.format_exc(), listener.warnings)
    os.write(writing, pickle.dumps(outcome))
    os._exit(0)


def die_at(number: int) -> None:
    """Die before a file operation; of a temporary file that was to become durable then, half is there."""
    operations, fsync = 0, os.fsync

    def counted(function: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == number:
                if function is fsync:
                    path = Path(f"/proc/self/fd/{values[0]}").resolve()
                    if path.suffix == ".tmp":
                        os.truncate(path, path.stat().st_size // 2)
                os._exit(KILLED)
            return function(*values, **named)

        return call

    for name in ("fsync", "rename", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
