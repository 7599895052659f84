"""Runs that are repeated and run out of memory: what is a fault, with a GPU's functions replaced."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_barber.method import layer as layer_module
from llm_barber.tools.selftest import runs
from llm_barber.tools.selftest.bench import CPU, TINY, Bench
from llm_barber.tools.selftest.result import NotRunError
from llm_barber.tools.selftest.runs import REPEATED, check_memory, check_repeat


def test_the_same_bytes_pass_and_others_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(finding.passed for finding in check_repeat(bench))
    whole, number = Bench.prune, 0

    def other_each_time(self: Bench, *arguments: Any, **settings: Any) -> Any:
        nonlocal number
        number += 1
        return whole(self, *arguments, **{**settings, "sparsity": 0.5 + 0.1 * (number % 2), "pattern": None})

    monkeypatch.setattr(Bench, "prune", other_each_time)
    findings = list(check_repeat(bench))
    assert len(findings) == len(REPEATED)
    assert not any(finding.passed for finding in findings)
    assert all("other bytes in model" in finding.text for finding in findings)


def test_a_warning_of_sums_without_order_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Bench.prune
    warned = ["gradients are added up in no fixed order: …"]
    monkeypatch.setattr(Bench, "prune", lambda *arguments, **settings: (*whole(*arguments, **settings)[:2], warned))
    assert not any(finding.passed for finding in check_repeat(bench))


class Memory:
    """A GPU's memory in the eyes of `check_memory`: the peak is what a batch takes; beyond the limit it runs out."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, limited: bool = True) -> None:
        self.limit, self.batch = float("inf"), 0
        whole, result_of = Bench.prune, layer_module.block_result

        def prune(self_: Bench, device: torch.device, **settings: Any) -> Any:
            self.batch = settings["batch_size"]
            settings.pop("activations_off_device", None)
            return whole(self_, CPU, **settings)

        def block_result(*arguments: Any) -> Any:
            if limited and self.peak() > self.limit:
                self.batch //= 2
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result_of(*arguments)

        monkeypatch.setattr(Bench, "prune", prune)
        monkeypatch.setattr(layer_module, "block_result", block_result)
        monkeypatch.setattr(runs, "ROOMY", TINY)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: self.peak())
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_fraction)
        bench.device = torch.device("cuda", 0)

    def peak(self) -> int:
        return 10 + 30 * self.batch

    def set_fraction(self, share: float, _: torch.device) -> None:
        self.limit = share * 1000


def test_a_run_that_recovers_passes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(bench, monkeypatch)
    recovered, masks = check_memory(bench)
    assert recovered.passed, recovered
    assert "windows at a time from now on" in recovered.text
    assert masks.passed
    assert memory.limit == 1000  # as before


def test_a_limit_that_is_never_reached_proves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(bench, monkeypatch, limited=False)
    recovered, _ = check_memory(bench)
    assert not recovered.passed
    assert "never reached" in recovered.text


def test_a_batch_that_takes_no_more_memory_is_not_limited(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(bench, monkeypatch)
    monkeypatch.setattr(memory, "peak", lambda: 100)
    with pytest.raises(NotRunError, match="4 windows took"):
        list(check_memory(bench))


def test_a_cpu_has_no_such_memory(bench: Bench) -> None:
    with pytest.raises(NotRunError):
        list(check_memory(bench))
