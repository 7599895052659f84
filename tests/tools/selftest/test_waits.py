"""Waits for the GPU: what is counted and refused, with PyTorch's modes replaced."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_barber.method import tune
from llm_barber.tools.selftest import waits
from llm_barber.tools.selftest.bench import CPU, Bench
from llm_barber.tools.selftest.result import NotRunError
from llm_barber.tools.selftest.waits import check_waits, judge_waits, noted_waits


class SyncMode:
    """PyTorch's mode of synchronisation; `waits` does what an operation that waits for a GPU does in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.modes = "default", list[str]()
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)

    def set(self, mode: str) -> None:
        self.mode = mode
        self.modes.append(mode)

    def waits(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=2)


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> SyncMode:
    return SyncMode(monkeypatch)


@pytest.fixture
def pretended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose GPU is a CPU."""
    whole = Bench.prune
    monkeypatch.setattr(Bench, "prune", lambda self, _, **settings: whole(self, CPU, **settings))
    bench.device = torch.device("cuda", 0)
    return bench


def test_waits_between_two_steps_are_noted_by_line(sync: SyncMode) -> None:
    values = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([values])
    values.grad = torch.ones(2)
    with noted_waits() as steps:
        sync.waits()  # before the first step
        for count in (3, 1, 0):
            optimizer.step()
            for _ in range(count):
                sync.waits()
            warnings.warn("another warning", stacklevel=1)
    assert sync.modes == ["warn", "default"]
    assert [len(lines) for lines in steps] == [3, 1, 0]
    assert len(set(steps[0])) == 1
    assert steps[0][0].startswith("test_waits.py:")
    optimizer.step()
    assert len(steps) == 3
    finding = judge_waits(steps, 1)  # the last interval is no step
    assert finding.passed
    assert "waits 1 times (budget 1): test_waits.py:" in finding.text
    assert not judge_waits(steps, 0).passed
    assert not judge_waits([[]], 5).passed
    assert not judge_waits([], 5).passed


def test_a_step_may_wait_where_it_has_to(pretended: Bench, sync: SyncMode, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            sync.waits()
            return function(*arguments)

        return run

    at_functions = {(module, name): waiting(getattr(module, name)) for module, name in waits.WAITING}
    for (module, name), function in at_functions.items():
        monkeypatch.setattr(module, name, function)
    counted, refused = check_waits(pretended)
    assert counted.passed
    assert "waits 2 times (budget 2): test_waits.py:" in counted.text
    assert refused.passed
    assert "does not wait outside of check_finite and _without_ties" in refused.text
    assert sync.mode == "default"
    assert all(getattr(*place) is function for place, function in at_functions.items())  # as before


def test_a_step_must_not_wait_elsewhere(pretended: Bench, sync: SyncMode, monkeypatch: pytest.MonkeyPatch) -> None:
    add = tune.GradientSums.add

    def waiting(*arguments: Any) -> None:
        sync.waits()
        add(*arguments)

    monkeypatch.setattr(tune.GradientSums, "add", waiting)
    counted, refused = check_waits(pretended)
    assert not counted.passed
    assert not refused.passed
    assert "outside of check_finite and _without_ties: test_waits.py:" in refused.text
    assert sync.mode == "default"


def test_a_run_of_one_step_proves_nothing(pretended: Bench, sync: SyncMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "TUNED", {"preset": "paper"})
    assert not any(finding.passed for finding in check_waits(pretended))


def test_other_errors_are_not_waits(pretended: Bench, sync: SyncMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "check_finite", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(check_waits(pretended))


def test_nothing_waits_for_a_cpu(bench: Bench) -> None:
    with pytest.raises(NotRunError):
        list(check_waits(bench))
