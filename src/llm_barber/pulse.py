"""End a process of a run whose others are silent: stopped, or on a machine that vanished with its connections open.

Each process counts up a number of its own in the store where they met, and looks whether those of the others go up.
A process that ends, in whatever way, closes its connections, and is noticed without this.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not in its __all__

BEAT = 5.0  # seconds between two looks
SILENCE = 50.0  # seconds after which a process is taken for gone: with a look more, less than a minute
EXIT_CODE = 1


@contextmanager
def watched(rank: int, count: int) -> Iterator[None]:
    """End this process, from a thread, if one of the other `count - 1` is silent for `SILENCE`."""
    stopped = Event()
    heard = {other: time.monotonic() for other in range(count) if other != rank}
    threads = [Thread(target=work, args=(rank, heard, stopped), daemon=True) for work in (_beat, _watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()


def _beat(rank: int, heard: dict[int, float], stopped: Event) -> None:
    """Count up, and note when the others did. If the store is gone nothing is heard any more, which `_watch` sees."""
    try:
        # A connection of its own: the group's may be waiting for something.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=SILENCE))
        counts: dict[int, int] = {}
        while not stopped.wait(BEAT):
            store.add(_key(rank), 1)
            for other in heard:
                now = store.add(_key(other), 0)
                if now != counts.get(other):
                    counts[other] = now
                    heard[other] = time.monotonic()
    except (RuntimeError, OSError):
        return


def _key(rank: int) -> str:
    return f"llm-barber/pulse/{rank}"


def _watch(rank: int, heard: dict[int, float], stopped: Event) -> None:
    """End the process, whose main thread may wait in a collective operation that nothing else interrupts."""
    while not stopped.wait(min(1.0, BEAT)):
        silent = [other for other, when in heard.items() if time.monotonic() - when > SILENCE]
        if silent:
            names = ", ".join(str(other) for other in silent)
            sys.stderr.write(
                f"error: process {rank} has heard nothing of process {names} for {SILENCE:.0f} s\n"
                "hint: its machine may have vanished, or the network between; the run goes on with --resume, with any "
                "number of processes\n"
            )
            sys.stderr.flush()
            os._exit(EXIT_CODE)
