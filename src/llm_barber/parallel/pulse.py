"""End a process of a run when another failed, or is silent: stopped, or on a machine that vanished.

Each process counts up a number of its own in the store where they met, and looks whether those of the others go up.
The connections of a process that ends are closed, which is mostly noticed without this.
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

BEAT = 5.0  # seconds between two looks
SILENCE = 50.0  # seconds after which a process is taken for gone: with a look more, less than a minute
GRACE = 10.0  # seconds in which the failure of another is mostly noticed without this
EXIT_CODE = 1
DONE, FAILED = -(2**40), -(2**50)  # what is added to the number of a process that stops counting
RUNS = itertools.count()  # of this program: each has numbers of its own


@contextmanager
def watched(rank: int, count: int) -> Iterator[None]:
    """End this process, from a thread, if another of the `count` is silent for `SILENCE` after it has been heard.

    And if another left by an exception, `GRACE` after that.
    """
    pulse = _Pulse(next(RUNS), rank, [other for other in range(count) if other != rank])
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
        beating.join(BEAT)  # it says how this process left


class _Pulse:
    """What the two threads of a process share."""

    def __init__(self, run: int, rank: int, others: list[int]) -> None:
        self.run = run
        self.rank = rank
        self.others = others
        self.stopped = Event()
        self.last_word = DONE
        self._heard: dict[int, float] = {}  # when, by process
        self._failed: dict[int, float] = {}

    def beat(self) -> None:
        """Count up, and note when the others did. While the store cannot be reached nothing is heard."""
        counts: dict[int, int] = {}
        while not self.stopped.is_set():
            with suppress(RuntimeError, OSError):
                # A connection of its own: the group's may be waiting for something.
                place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = TCPStore(*place, timeout=timedelta(seconds=SILENCE))
                while not self.stopped.is_set():
                    store.add(self._key(self.rank), 1)
                    for other in self.others:
                        self._note(other, store.add(self._key(other), 0), counts)
                    self.stopped.wait(BEAT)
                store.add(self._key(self.rank), self.last_word)
                return
            self.stopped.wait(BEAT)

    def _note(self, other: int, now: int, counts: dict[int, int]) -> None:
        if now < 0:
            self._heard.pop(other, None)
            if now < FAILED // 2:
                self._failed.setdefault(other, time.monotonic())
        elif now != counts.get(other, now):
            self._heard[other] = time.monotonic()
        counts[other] = now

    def watch(self) -> None:
        """End the process, whose main thread may wait in a collective operation that nothing else interrupts."""
        last = time.monotonic()
        while not self.stopped.wait(min(1.0, BEAT)):
            now = time.monotonic()
            if now - last > 2 * BEAT:  # this process itself did not run, and the others may have been stopped with it
                self._heard.update(dict.fromkeys(list(self._heard), now))
            last = now
            if silent := [other for other, when in list(self._heard.items()) if now - when > SILENCE]:
                self._end(
                    f"has heard nothing of process {_named(silent)} for {SILENCE:.0f} s",
                    "its machine may have vanished, or the network between",
                )
            if failed := [other for other, when in list(self._failed.items()) if now - when > GRACE]:
                self._end(f"cannot go on: process {_named(failed)} failed", "look for its message")

    def _key(self, rank: int) -> str:
        return f"llm-barber/pulse/{self.run}/{rank}"

    def _end(self, message: str, hint: str) -> None:
        blocking = True
        try:
            blocking = os.get_blocking(sys.stderr.fileno())
            os.set_blocking(sys.stderr.fileno(), False)  # nobody may be reading it
            sys.stderr.write(
                f"error: process {self.rank} {message}\n"
                f"hint: {hint}; the run goes on with --resume, with any number of processes\n"
            )
            sys.stderr.flush()
        finally:
            with suppress(OSError, ValueError):
                os.set_blocking(sys.stderr.fileno(), blocking)  # others share it: the terminal, torchrun
            os._exit(EXIT_CODE)


def _named(processes: list[int]) -> str:
    return ", ".join(map(str, processes))
