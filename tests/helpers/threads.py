"""A product that several threads, and a forked process, compute."""

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor


def check_threads_and_fork(multiply: Callable[[], Tensor], expected: Tensor) -> None:
    """Compare the product of three threads at once, and of a forked process, with the expected one, bit for bit.

    `multiply` must do no more than that: an operation of PyTorch with several threads hangs in a forked process.
    """
    results: list[bool] = []

    def call() -> None:
        results.append(all(torch.equal(multiply(), expected) for _ in range(50)))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 3
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(multiply(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
