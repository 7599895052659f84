"""A run that is killed at any moment goes on to the same bytes."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, RebuildConfig, prune, rebuild
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.folder import locked
from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME
from llm_barber.errors import OutputError
from llm_barber.progress import Silent
from llm_barber.run import stream as run_module
from llm_barber.run.dry_run import DryRun, dry_run
from llm_barber.settings.initial import Initial
from tests.conftest import make_model
from tests.helpers.resumed_runs import (
    MASK_ALONE,
    check_resumed,
    record_passed_layers,
    record_pruned_layers,
    resume_warnings,
)
from tests.helpers.runs import SETTINGS, read_untimed_files, read_untimed_record, run, run_killed_at, run_stopped


@pytest.mark.parametrize(
    "settings",
    [
        {"rebuild_ratio": 0.5},
        {"preset": "best", "target_mix": 0.5, "guard": 0.25},
        {**MASK_ALONE, "format": "packed", "prune_head": True},
        {"preset": "mask", "pattern": "2:4", "tune_passes": 1, "guard": 0.25},
    ],
    ids=["paper", "best", "SparseGPT's mask", "reordered"],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, Any]
) -> None:
    run(model, tmp_path / "whole", tokens, **settings)
    kills, reached, passes = 0, 0, 0
    for number in range(1, 200, 3):  # each on top of what the earlier ones left
        killed = run_killed_at(
            number, model, tmp_path / "out", tokens, computed=tmp_path / "computed", resume=True, **settings
        )
        lines = (tmp_path / "computed").read_text().split()
        passed = [line for line in lines if line.startswith("-")]
        assert len(passed) <= 2  # two where writing took longer than the next layer
        passes += len(passed)
        if computed := [int(line) for line in lines if line not in passed]:
            # Of what was computed before only the layer that was in the making, or was not durable yet, is again.
            assert computed == list(range(computed[0], computed[-1] + 1))
            assert computed[0] >= reached - 1  # the shard of the layer before may have been waiting
            reached = computed[-1]
        if not killed:
            break
        kills += 1
        if (tmp_path / "out").exists():  # killed after the folder had its name: nothing is lost
            break
    assert kills > 5
    # Its stream went through updated weights, which are not written.
    assert (passes > 0) is ("rebuild" not in settings)
    assert reached == 2
    left = {STATE_NAME, STATE_BEFORE, "llm-barber.lock"}
    whole, resumed = read_untimed_files(tmp_path / "whole"), read_untimed_files(tmp_path / "out")
    assert resumed.keys() - left == whole.keys()
    assert {name: resumed[name] for name in whole} == whole
    assert read_untimed_record(tmp_path / "out") == read_untimed_record(tmp_path / "whole")


def test_only_what_is_missing_is_computed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    pruned_layers = record_pruned_layers(monkeypatch)
    report = run(model, tmp_path / "out", tokens, resume=True)
    assert pruned_layers == [2]
    assert report.seconds["total"] >= sum(layer.seconds for layer in report.layers) > 0
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    run(model, tmp_path / "fresh", tokens, resume=True)  # nothing to go on with: it starts
    assert read_untimed_files(tmp_path / "fresh") == read_untimed_files(tmp_path / "whole")


def test_the_seconds_of_an_allocation_are_kept_before_the_first_layer_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_module.allocate

    def slow(*values: Any) -> Any:
        time.sleep(0.5)
        return whole(*values)

    monkeypatch.setattr(run_module, "allocate", slow)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=0)
    kept = json.loads((tmp_path / "out.partial" / STATE_NAME).read_text())["seconds"]
    assert kept["total"] >= kept["allocate"] >= 0.5
    seconds = run(model, tmp_path / "out", tokens, resume=True).seconds
    assert seconds["allocate"] == kept["allocate"]
    assert seconds["total"] >= kept["total"] + seconds["layers"]


class Steps(Silent):
    """Listener that keeps the stages that have steps, and how many of these are told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.steps: dict[str, int] = {}

    def start(self, title: str, total: int, finished: int = 0) -> None:
        self.stages.append((title, total, finished))

    def advance(self, detail: str) -> None:
        title = self.stages[-1][0]
        self.steps[title] = self.steps.get(title, 0) + 1


def test_finished_layers_are_no_steps_of_the_run_that_goes_on(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    told = Steps()
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **SETTINGS, resume=True), told)
    assert told.stages[-1] == ("pruning", 3, 2)
    assert told.steps["pruning"] == 1


def test_the_dense_stream_goes_through_a_finished_layer_in_the_same_batches(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refined linears have held-out windows apart; this model's layers round otherwise by batch size."""
    settings = {"initial": "wanda", "refine": "swaps", "reconstruct": "least-squares"}
    jamba = make_model(tmp_path / "jamba", "jamba")
    run(jamba, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, jamba, tmp_path / "out", tokens, layers=1, **settings)
    next((tmp_path / "out.partial").glob("activations-*")).unlink()
    passed_layers = record_passed_layers(monkeypatch)
    run(jamba, tmp_path / "out", tokens, resume=True, **settings)
    assert passed_layers == [0]
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("initial", [method for method in Initial if method.has_updates])
def test_layers_whose_output_cannot_be_made_again_are_pruned_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, initial: str
) -> None:
    """Updated weights made it, and dense ones are written."""
    settings = {**MASK_ALONE, "initial": initial}
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    newest = max((tmp_path / "out.partial").glob("activations-*"))
    newest.unlink()
    check_resumed(monkeypatch, tmp_path, model, tokens, [1, 2], **settings)
    monkeypatch.undo()
    for kept in ({"keep_updates": True}, {"rebuild": True}, {"refine": "swaps"}):
        shutil.rmtree(tmp_path / "whole")
        run(model, tmp_path / "whole", tokens, **{**settings, **kept})
        shutil.rmtree(tmp_path / "out")
        run_stopped(monkeypatch, model, tmp_path / "out", tokens, **{**settings, **kept})
        max((tmp_path / "out.partial").glob("activations-*")).unlink()
        check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1], **{**settings, **kept})
        monkeypatch.undo()


def test_a_model_that_was_written_since_is_told_of(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    os.utime(model / "model.safetensors", ns=(1, 1))
    warnings = resume_warnings(model, tmp_path / "out", tokens)
    assert [warning for warning in warnings if warning.startswith("model.safetensors of the model was modified after")]


def test_an_allocation_is_not_made_twice(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"preset": "mask"}
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=0, **settings)
    monkeypatch.setattr("llm_barber.run.stream.allocate", None)
    run(model, tmp_path / "out", tokens, resume=True, **settings)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_rebuild_goes_on_too_and_notices_another_pruned_model(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "pruned", tokens, rebuild=False)
    settings = {"dense": model, "pruned": tmp_path / "pruned", "calibration": tokens, "rebuild_ratio": 0.5, **SETTINGS}
    rebuild(RebuildConfig(output=tmp_path / "whole", **settings))
    whole = run_module.prune_layer
    monkeypatch.setattr(
        run_module, "prune_layer", lambda job, index, *rest: whole(job, index, *rest) if index < 1 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        rebuild(RebuildConfig(output=tmp_path / "out", **settings))
    monkeypatch.undo()
    run(model, tmp_path / "other", tokens, rebuild=False, sparsity=0.6)
    with pytest.raises(OutputError, match="another pruned model's files"):
        rebuild(RebuildConfig(output=tmp_path / "out", resume=True, **settings | {"pruned": tmp_path / "other"}))
    rebuild(RebuildConfig(output=tmp_path / "out", resume=True, **settings))
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_a_dry_run_says_where_it_would_go_on_and_writes_nothing(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    (tmp_path / "out.partial" / STATE_NAME).write_text("{")  # the state before is taken
    before = read_untimed_files(tmp_path / "out.partial")

    def planned(**settings: Any) -> DryRun:
        options = {**SETTINGS, "model": model, "output": tmp_path / "out", "calibration": tokens, **settings}
        return dry_run(PruneConfig(**options))

    plan = planned(resume=True)
    assert plan.finished_layers == 2
    assert ("goes on", "after 2 of 3 layers, if their files are whole") in plan.rows()
    assert planned(overwrite=True).finished_layers == 0
    with locked(tmp_path / "out.partial" / LOCK_NAME), pytest.raises(OutputError, match="another run is writing"):
        planned(resume=True)
    with pytest.raises(OutputError, match="unfinished run with 2 finished layers"):
        planned()
    with pytest.raises(OutputError, match=r"started with another sparsity \(then 0.5, now 0.6\)"):
        planned(resume=True, sparsity=0.6)
    with pytest.raises(OutputError, match=r"target_mix \(then 0.5, now 0.75\)"):
        planned(resume=True, target_mix=0.75)
    assert planned(resume=True, target_mix=0.5).finished_layers == 2
    assert read_untimed_files(tmp_path / "out.partial") == before
    run(model, tmp_path / "out", tokens, resume=True)
    assert planned(resume=True).finished_layers == 3
    with pytest.raises(OutputError, match="exists"):
        planned()
