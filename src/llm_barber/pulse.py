"""End a process of a run whose others are silent: stopped, or on a machine that vanished with its connections open.

Each process counts up a number of its own in the store where they met, and looks whether those of the others go up.
A process that ends, in whatever way, closes its connections, and is noticed without this.
"""

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
EXIT_CODE = 1
LEFT = -(2**40)  # what is added to the number of a process that stops counting, whether it is done or failed


@contextmanager
def watched(rank: int, count: int) -> Iterator[None]:
    """End this process, from a thread, if another of the `count` is silent for `SILENCE` after it has been heard."""
    stopped = Event()
    heard: dict[int, float] = {}  # when, by process
    others = [other for other in range(count) if other != rank]
    beating = Thread(target=_beat, args=(rank, others, heard, stopped), daemon=True)
    watching = Thread(target=_watch, args=(rank, heard, stopped), daemon=True)
    beating.start()
    watching.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join(BEAT)  # it says that this process left


def _beat(rank: int, others: list[int], heard: dict[int, float], stopped: Event) -> None:
    """Count up, and note when the others did. While the store cannot be reached nothing is heard; `_watch` sees it."""
    counts: dict[int, int] = {}
    while not stopped.is_set():
        with suppress(RuntimeError, OSError):
            # A connection of its own: the group's may be waiting for something.
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(*place, timeout=timedelta(seconds=SILENCE))
            store.set(_key(rank), "0")  # a group before this one may have left a number
            while not stopped.is_set():
                store.add(_key(rank), 1)
                for other in others:
                    now = store.add(_key(other), 0)
                    if now < 0:
                        heard.pop(other, None)
                    elif now != counts.get(other, now):
                        heard[other] = time.monotonic()
                    counts[other] = now
                stopped.wait(BEAT)
            store.add(_key(rank), LEFT)
            return
        stopped.wait(BEAT)


def _key(rank: int) -> str:
    return f"llm-barber/pulse/{rank}"


def _watch(rank: int, heard: dict[int, float], stopped: Event) -> None:
    """End the process, whose main thread may wait in a collective operation that nothing else interrupts."""
    last = time.monotonic()
    while not stopped.wait(min(1.0, BEAT)):
        now = time.monotonic()
        if now - last > 2 * BEAT:  # this process itself did not run, and the others may have been stopped with it
            heard.update(dict.fromkeys(list(heard), now))
        last = now
        silent = [other for other, when in list(heard.items()) if now - when > SILENCE]
        if silent:
            names = ", ".join(str(other) for other in silent)
            try:
                os.set_blocking(sys.stderr.fileno(), False)
                sys.stderr.write(
                    f"error: process {rank} has heard nothing of process {names} for {SILENCE:.0f} s\n"
                    "hint: its machine may have vanished, or the network between; the run goes on with --resume, with "
                    "any number of processes\n"
                )
                sys.stderr.flush()
            finally:
                os._exit(EXIT_CODE)
