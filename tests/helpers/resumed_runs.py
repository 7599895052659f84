"""Runs that are resumed: the layers that they compute, those that they pass through, and their warnings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_barber import PruneConfig, prune
from llm_barber.run import resuming as resuming_module
from llm_barber.run import stream as run_module
from tests.conftest import Listener
from tests.helpers.runs import SETTINGS, read_untimed_files, run

MASK_ALONE: dict[str, Any] = {"initial": "sparsegpt", "rebuild": False, "pattern": "2:4"}


def record_layers(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, index: Callable[[Any], int]
) -> list[int]:
    """Record the layers that a function is called for from now on; `index` gets them from its second argument."""
    original = getattr(module, name)
    layers: list[int] = []

    def count(job: Any, layer: Any, *values: Any) -> Any:
        layers.append(index(layer))
        return original(job, layer, *values)

    monkeypatch.setattr(module, name, count)
    return layers


def record_pruned_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the layers that are pruned from now on."""
    return record_layers(monkeypatch, run_module, "prune_layer", lambda index: index)


def record_passed_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the finished layers that the streams go through once more from now on."""
    return record_layers(monkeypatch, resuming_module, "pass_layer", lambda result: result.index)


def check_resumed(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    model: Path,
    tokens: Path,
    computed: list[int],
    passed: Sequence[int] = (),
    **settings: Any,
) -> None:
    """Resume the run in `out`: layers `computed` are pruned, the streams pass `passed`, the files are `whole`'s."""
    pruned_layers, passed_layers = record_pruned_layers(monkeypatch), record_passed_layers(monkeypatch)
    run(model, folder / "out", tokens, resume=True, **settings)
    assert pruned_layers == computed
    assert passed_layers == list(passed)
    assert read_untimed_files(folder / "out") == read_untimed_files(folder / "whole")


def resume_warnings(model: Path, out: Path, tokens: Path, **settings: Any) -> list[str]:
    """Resume a run; return its warnings."""
    listener = Listener()
    config = PruneConfig(model=model, output=out, calibration=tokens, resume=True, **{**SETTINGS, **settings})
    prune(config, listener)
    return listener.warnings
