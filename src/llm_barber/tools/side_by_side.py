"""Run independent tasks side by side, in processes that share the processor's cores.

Much of a task uses one core: two tasks with half of the threads each end sooner than one after the other.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children, connection, get_context, parent_process
from typing import TypeVar

import torch

from llm_barber.errors import BarberError

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


@contextmanager
def worker_processes(count: int, module: str) -> Iterator[ProcessPoolExecutor]:
    """Start processes, each with an equal share of this process's threads; an error or Ctrl-C here ends them at once.

    Args:
        count: number of processes.
        module: the module of their tasks, which they import while this process goes on.
    """
    threads = max(1, torch.get_num_threads() // count)
    with ProcessPoolExecutor(count, get_context("spawn"), _prepare, (threads, module)) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
        try:
            for _ in range(count):
                pool.submit(os.getpid)  # any task starts a process
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def side_by_side(
    pool: ProcessPoolExecutor, count: int, function: Callable[[Task], Outcome], tasks: Iterable[Task]
) -> Iterator[Outcome]:
    """Call a function with each task, at most `count` at a time, and yield the outcomes as they come.

    The next task is taken from `tasks` when a process is free, so that it may depend on outcomes before.

    Raises:
        BarberError: a process was ended from outside, or the function raised it.
    """
    running: set[Future[Outcome]] = set()
    try:
        for task in tasks:
            running.add(pool.submit(function, task))
            if len(running) == count:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise BarberError(
            "a process that pruned a model was ended from outside",
            "is the memory too small for two models? OMP_NUM_THREADS=1 takes them one after the other",
        ) from error


def _prepare(threads: int, module: str) -> None:
    """Import a module in a new process, set its number of threads, and let it end with the process that started it."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import_module(module)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
