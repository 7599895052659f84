"""Waits of the host for the GPU: counted by line of the code, and refused by PyTorch."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from llm_barber.masking import selection
from llm_barber.method import tune
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.result import Finding, NotRunError

SYNCHRONISES = "synchronizing CUDA operation"  # in PyTorch's warnings and errors
SHOWN_LINES = 8
WAITS = 2  # most waits of a step of tuning for the GPU, as on the pretend GPU
# Functions in which a step of tuning waits: for gradients that are not finite, and for ties of scores.
WAITING: tuple[tuple[ModuleType, str], ...] = ((tune, "check_finite"), (selection, "_without_ties"))
TUNED: dict[str, Any] = {"preset": "mask", "tune_passes": 2, "tune_windows": 4, "guard": 0}


def check_waits(bench: Bench) -> Iterator[Finding]:
    """Count how often a step of tuning waits for the GPU, by line of the code.

    Raises:
        NotRunError: the device is a CPU.
    """
    if not bench.on_gpu:
        raise NotRunError("nothing waits for a CPU")
    with noted_waits() as steps:
        bench.prune(bench.device, **TUNED)
    yield judge_waits(steps, WAITS)
    yield _check_refused(bench)


def _check_refused(bench: Bench) -> Finding:
    """Tune for one step in PyTorch's mode in which a wait for the GPU is an error, outside of `WAITING`."""
    where = f"outside of {' and '.join(name for _, name in WAITING)}"
    try:
        with refused_waits() as modes:
            bench.prune(bench.device, **TUNED)
    except RuntimeError as error:
        if SYNCHRONISES not in str(error):
            raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(text=f"a step waits {where}: {Path(line.filename).name}:{line.lineno}", passed=False)
    if len(modes) < 2:
        return Finding(text="the run had no second step of tuning", passed=False)
    return Finding(text=f"a step of tuning does not wait {where}", passed=True)


@contextmanager
def refused_waits() -> Iterator[list[str]]:
    """Make a wait for the GPU an error from an optimizer's first step to its second one, except within `WAITING`.

    Yields PyTorch's mode after each step.
    """
    before, modes = torch.cuda.get_sync_debug_mode(), list[str]()

    def turn(*_: Any) -> None:
        modes.append("default" if modes else "error")
        torch.cuda.set_sync_debug_mode(modes[-1])

    with ExitStack() as stack:
        for module, name in WAITING:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, _allowed(getattr(module, name)))
        stack.callback(torch.cuda.set_sync_debug_mode, before)
        stack.callback(register_optimizer_step_post_hook(turn).remove)
        yield modes


def _allowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function wait for the GPU."""

    def run(*arguments: Any) -> Any:
        with sync_mode("default"):
            return function(*arguments)

    return run


def judge_waits(steps: list[list[str]], budget: int) -> Finding:
    """Compare the waits of the step that has the fewest with a budget; other intervals have more than a step."""
    if len(steps) < 2:  # the last interval ends with the run
        return Finding(text="no step of tuning was seen", passed=False)
    lines = min(steps[:-1], key=len)
    shown = [f"{line} × {count}" for line, count in Counter(lines).most_common(SHOWN_LINES)]
    return Finding(
        text=f"a step of tuning waits {len(lines)} times (budget {budget}){': ' if shown else ''}{', '.join(shown)}",
        passed=len(lines) <= budget,
    )


@contextmanager
def noted_waits() -> Iterator[list[list[str]]]:
    """Note the lines of the code that wait for the GPU, between each two steps of an optimizer, within the context."""
    steps: list[list[str]] = []

    def begin(*_: Any) -> None:
        steps.append([])

    def note(message: Warning | str, category: type[Warning], filename: str, line: int, *_: Any) -> None:
        if SYNCHRONISES in str(message) and steps:
            steps[-1].append(f"{Path(filename).name}:{line}")

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(begin).remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        stack.enter_context(sync_mode("warn"))
        yield steps


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Set what PyTorch does when an operation waits for the GPU, within the context.

    Args:
        mode: `default`: nothing; `warn`: warn; `error`: raise a RuntimeError.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
