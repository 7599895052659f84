"""Runs on a tiny model: whole, stopped, killed or resumed, and what of their files must be the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.run import resuming as resuming_module
from llm_barber.run import stream as run_module
from tests.conftest import Listener
from tests.soak.children import KILLED, die_at

SETTINGS: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "report": False}
MASK_ALONE: dict[str, Any] = {"initial": "sparsegpt", "rebuild": False, "pattern": "2:4"}  # it runs other weights


def run(model: Path, out: Path, tokens: Path, listener: Listener | None = None, **settings: Any) -> RunReport:
    """Prune with `SETTINGS` and the settings given."""
    return prune(PruneConfig(model=model, output=out, calibration=tokens, **{**SETTINGS, **settings}), listener)


def read_untimed_files(folder: Path) -> dict[str, bytes]:
    """Read every file but the record and the model card, which have times in them."""
    timed = ("barber.json", "README.md")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in timed}


def read_untimed_record(folder: Path) -> dict[str, Any]:
    """Read the record without its times, and without what the settings and the folder's name change."""
    record = json.loads((folder / "barber.json").read_text())
    for layer in record["layers"]:
        layer.pop("seconds")
    timed = ("seconds", "peak_memory", "output", "settings", "digest")
    return {name: value for name, value in record.items() if name not in timed}


def note_layers(patch: pytest.MonkeyPatch, note: Callable[[str], None]) -> None:
    """Note each layer that is pruned from now on, as "2", and each that is passed through once more, as "-2"."""

    def noting(module: ModuleType, name: str, line: Callable[[Any], str]) -> None:
        original = getattr(module, name)

        def noted(job: Any, layer: Any, *values: Any) -> Any:
            note(line(layer))
            return original(job, layer, *values)

        patch.setattr(module, name, noted)

    noting(run_module, "prune_layer", str)
    noting(resuming_module, "pass_layer", lambda result: f"-{result.index}")


def run_killed_at(number: int, *arguments: Any, computed: Path = Path(os.devnull), **settings: Any) -> bool:
    """Run in a process that dies, as by kill -9, just before its `number`-th file operation; False: it finished.

    A file that was to become durable then is left half written.

    Args:
        number: file operations (fsync, rename, unlink) are counted from 1.
        arguments: for `run`.
        computed: file for the layers that the process began, a line each, as `note_layers` writes them.
        settings: for `run`.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        die_at(number)
        with computed.open("w", buffering=1) as file:
            note_layers(pytest.MonkeyPatch(), lambda line: print(line, file=file))
            try:
                run(*arguments, **settings)
            except BaseException:
                os._exit(1)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def run_stopped(monkeypatch: pytest.MonkeyPatch, *arguments: Any, layers: int = 2, **settings: Any) -> None:
    """Run until `layers` layers are finished, then raise `KeyboardInterrupt` in the run."""
    whole = run_module.prune_layer

    def stop(job: Any, index: int, *rest: Any) -> Any:
        if index == layers:
            raise KeyboardInterrupt
        return whole(job, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prune_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, **settings)


def resume(model: Path, out: Path, tokens: Path, **settings: Any) -> tuple[list[str], list[str]]:
    """Resume a run; returns the layers that it began, as `note_layers` writes them, and its warnings."""
    listener, layers = Listener(), []
    with pytest.MonkeyPatch.context() as patch:
        note_layers(patch, layers.append)
        run(model, out, tokens, listener, resume=True, **settings)
    return layers, listener.warnings
