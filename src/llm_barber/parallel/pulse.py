"""End a process of a run when another process failed, or is silent.

A silent process was stopped, or its machine vanished. Each process counts up its number in the store where the
processes met, and checks that the other numbers rise. When a process ends, its connections are closed, which is mostly
noticed without this.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not in its __all__

BEAT = 5.0  # seconds between two checks
SILENCE = 50.0  # seconds after which a silent process is taken for gone; with another check, less than a minute
GRACE = 10.0  # seconds in which the failure of a process is mostly noticed without this
EXIT_CODE = 1
DONE, FAILED = -(2**40), -(2**50)  # added to the number of a process that stops counting
RUNS = itertools.count()  # runs of this program; each has its own numbers


def attempt() -> str:
    """Number of times that torchrun has started the processes anew; its store keeps what earlier ones wrote."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


@contextmanager
def watched(rank: int, count: int) -> Iterator[None]:
    """End this process, from a thread, if another process falls silent, or fails.

    It ends `SILENCE` seconds after another of the `count` processes was last heard, or `GRACE` seconds after another
    left by an exception.
    """
    pulse = _Pulse(next(RUNS), rank, [peer for peer in range(count) if peer != rank])
    beating = Thread(target=pulse.beat, daemon=True)
    beating.start()
    Thread(target=pulse.watch, daemon=True).start()
    try:
        yield
    except BaseException:
        pulse.last_word = FAILED
        raise
    finally:
        pulse.stopped.set()
        beating.join(BEAT)  # its last beat tells how this process left


class _Pulse:
    """State that the two threads of a process share."""

    def __init__(self, run: int, rank: int, peers: list[int]) -> None:
        self.run = run
        self.rank = rank
        self.peers = peers
        self.stopped = Event()
        self.last_word = DONE
        # Times, by process, at which its number last rose, and at which its failure was noticed.
        self._heard: dict[int, float] = {}
        self._failed: dict[int, float] = {}

    def beat(self) -> None:
        """Count up, and note which other numbers rose; while the store cannot be reached, none does."""
        counts: dict[int, int] = {}
        while not self.stopped.is_set():
            with suppress(RuntimeError, OSError):
                # A separate connection: the group's may be waiting in an operation.
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = TCPStore(*address, timeout=timedelta(seconds=SILENCE))
                while not self.stopped.is_set():
                    store.add(self._key(self.rank), 1)
                    for peer in self.peers:
                        self._note(peer, store.add(self._key(peer), 0), counts)
                    self.stopped.wait(BEAT)
                store.add(self._key(self.rank), self.last_word)
                return
            self.stopped.wait(BEAT)

    def _note(self, peer: int, number: int, counts: dict[int, int]) -> None:
        """Note another process's number; `counts` are the previous numbers."""
        if number < 0:
            self._heard.pop(peer, None)
            if number < FAILED // 2:
                self._failed.setdefault(peer, time.monotonic())
        elif number != counts.get(peer, 0):  # 0: it has not begun this run, and may be between two
            self._heard[peer] = time.monotonic()
        counts[peer] = number

    def watch(self) -> None:
        """End the process; nothing else interrupts a main thread that waits in a collective operation."""
        last = time.monotonic()
        while not self.stopped.wait(min(1.0, BEAT)):
            time_now = time.monotonic()
            if time_now - last > 2 * BEAT:  # this process was stopped, and other processes maybe with it
                self._heard.update(dict.fromkeys(list(self._heard), time_now))
            last = time_now
            if silent := [peer for peer, heard in list(self._heard.items()) if time_now - heard > SILENCE]:
                self._end(
                    f"has heard nothing of process {_named(silent)} for {SILENCE:.0f} s",
                    "its machine may have vanished, or the network between",
                )
            if failed := [peer for peer, noticed in list(self._failed.items()) if time_now - noticed > GRACE]:
                self._end(f"cannot go on: process {_named(failed)} failed", "look for its message")

    def _key(self, rank: int) -> str:
        return f"llm-barber/pulse/{attempt()}/{self.run}/{rank}"

    def _end(self, message: str, hint: str) -> None:
        """Write an error, and exit."""
        blocking = True
        try:
            blocking = os.get_blocking(sys.stderr.fileno())
            os.set_blocking(sys.stderr.fileno(), False)  # there may be no reader
            sys.stderr.write(
                f"error: process {self.rank} {message}\n"
                f"hint: {hint}; the run goes on with --resume, with any number of processes\n"
            )
            sys.stderr.flush()
        finally:
            with suppress(OSError, ValueError):
                os.set_blocking(sys.stderr.fileno(), blocking)  # it is shared with the terminal, or torchrun
            os._exit(EXIT_CODE)


def _named(processes: list[int]) -> str:
    return ", ".join(map(str, processes))
