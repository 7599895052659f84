"""Start the processes of one run, as torchrun would."""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_barber.errors import BarberError

REFUSED = 3  # exit code of a process whose function raised a `BarberError`
HANGING = 100.0  # seconds after which a process shows where it hangs, and ends


def free_port() -> int:
    """Return a port that nothing listens on.

    Each pytest-xdist worker has a range to itself, below the ports that systems hand out, so that no other socket of
    these tests takes the port meanwhile.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in range(21000 + 100 * worker, 21100 + 100 * worker):
        with socket.socket() as listener:
            try:
                listener.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def run_ranks(count: int, function: Callable[[int], Any], messages: Path | None = None) -> list[int]:
    """Call `function(rank)` in each of `count` processes of one run, and return their exit codes.

    Args:
        count: number of processes.
        function: called with the rank of its process.
        messages: folder for the message of each `BarberError`, in a file named by the rank.
    """
    port, children = free_port(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(HANGING, exit=True, file=sys.__stderr__)
            torch.set_num_threads(1)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
            code = 1
            try:
                function(rank)
                code = 0
            except BarberError as error:
                if messages is not None:
                    (messages / f"{rank}").write_text(f"{type(error).__name__}: {error}")
                code = REFUSED
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
