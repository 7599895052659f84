"""Runs on a tiny model: whole, stopped or killed, and what of their files must be the same."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.run import resuming as resuming_module
from llm_barber.run import stream as run_module
from tests.soak.children import KILLED, die_at

SETTINGS: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "report": False}


def run(model: Path, out: Path, tokens: Path, **settings: Any) -> RunReport:
    """Prune with `SETTINGS` and the settings given."""
    return prune(PruneConfig(model=model, output=out, calibration=tokens, **{**SETTINGS, **settings}))


def read_untimed_files(folder: Path) -> dict[str, bytes]:
    """Read every file but the record and the model card, which have times in them."""
    timed = ("barber.json", "README.md")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in timed}


def read_untimed_record(folder: Path) -> dict[str, Any]:
    """Read the record without its times, and without what the settings and the folder's name change."""
    record = json.loads((folder / "barber.json").read_text())
    for layer in record["layers"]:
        layer.pop("seconds")
    return {
        name: value
        for name, value in record.items()
        if name not in ("seconds", "peak_memory", "output", "settings", "digest")
    }


def run_killed_at(number: int, *arguments: Any, computed: Path = Path(os.devnull), **settings: Any) -> bool:
    """Run in a process that dies, as by kill -9, just before its `number`-th file operation; False: it finished.

    A file that was to become durable then is left half written.

    Args:
        number: file operations (fsync, rename, unlink) are counted from 1.
        arguments: for `run`.
        computed: file for the indices of the layers that the process began, a line each. A minus marks a layer that it
            only passed through once more.
        settings: for `run`.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        die_at(number)
        prune_layer, pass_layer = run_module.prune_layer, resuming_module.pass_layer

        def note_pruned(job: Any, index: int, *rest: Any) -> Any:
            with computed.open("a") as file:
                file.write(f"{index}\n")
            return prune_layer(job, index, *rest)

        def note_passed(job: Any, result: Any, *rest: Any) -> Any:
            with computed.open("a") as file:
                file.write(f"-{result.index}\n")
            return pass_layer(job, result, *rest)

        run_module.prune_layer, resuming_module.pass_layer = note_pruned, note_passed
        computed.write_text("")
        try:
            run(*arguments, **settings)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def keep_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the input of each layer durable before the layer after it is finished, however long that takes."""

    def begin(self: CheckpointWriter, _: int) -> bool:
        self._activations.wait()
        return True

    monkeypatch.setattr(CheckpointWriter, "begin_activations", begin)


def run_stopped(monkeypatch: pytest.MonkeyPatch, *arguments: Any, layers: int = 2, **settings: Any) -> None:
    """Run until `layers` layers are finished, then raise `KeyboardInterrupt` in the run; each input is kept."""
    keep_each_input(monkeypatch)
    whole, done = run_module.prune_layer, 0

    def stop(*values: Any) -> Any:
        nonlocal done
        done += 1
        if done > layers:
            raise KeyboardInterrupt
        return whole(*values)

    monkeypatch.setattr(run_module, "prune_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, **settings)
    monkeypatch.undo()
