"""A run that is killed at any moment goes on to the same bytes; damaged files cost the layers that they held."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, RebuildConfig, prune, rebuild
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.digests import with_digest
from llm_barber.checkpoint.folder import locked
from llm_barber.checkpoint.state import STATE_NAME, read_state
from llm_barber.errors import OutputError
from llm_barber.progress import Silent
from llm_barber.run import stream as run_module
from llm_barber.run.dry_run import DryRun, dry_run
from tests.conftest import make_model
from tests.helpers.runs import (
    MASK_ALONE,
    SETTINGS,
    read_untimed_files,
    read_untimed_record,
    resume,
    run,
    run_killed_at,
    run_stopped,
)

PUBLISHED: dict[str, Any] = {"initial": "wanda", "rebuild": False}  # no allocation, which would be kept


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
    out, kills, reached = tmp_path / "out", 0, 0
    for number in range(1, 200, 3):  # each on top of what the earlier ones left
        killed = run_killed_at(number, model, out, tokens, computed=tmp_path / "layers", resume=True, **settings)
        lines = (tmp_path / "layers").read_text().split()
        if computed := [int(line) for line in lines if not line.startswith("-")]:
            # Of what was computed before, only the layer that was in the making or not durable yet is again.
            assert computed == list(range(computed[0], computed[-1] + 1))
            assert reached - 1 <= computed[0]
            reached = computed[-1]
        if not killed or out.exists():  # killed after the folder had its name: nothing is lost
            break
        kills += 1
    assert kills > 5
    assert reached == 2
    whole, resumed = read_untimed_files(tmp_path / "whole"), read_untimed_files(out)
    assert resumed.keys() - {STATE_NAME, LOCK_NAME} == whole.keys()
    assert {name: resumed[name] for name in whole} == whole
    assert read_untimed_record(out) == read_untimed_record(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {**MASK_ALONE, "initial": "alps"}),
        ("llama", {**MASK_ALONE, "keep_updates": True}),
        ("llama", {**MASK_ALONE, "skip_layers": (0,)}),
        ("gpt2", MASK_ALONE),
        # Refined linears have held-out windows apart; this model's layers round otherwise by batch size.
        ("jamba", {"initial": "wanda", "refine": "swaps", "reconstruct": "least-squares"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_finished_layers_are_passed_through_and_not_pruned_again(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "dense", family)
    report = run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=1, **settings)
    layers, _ = resume(model, tmp_path / "out", tokens, **settings)
    assert layers == ["-0", *map(str, range(1, len(report.layers)))]
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_with_nothing_to_go_on_with_it_starts(tmp_path: Path, model: Path, tokens: Path) -> None:
    assert resume(model, tmp_path / "out", tokens)[0] == ["0", "1", "2"]


def test_an_allocation_and_its_seconds_are_kept_before_the_first_layer_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=0)
    kept = json.loads((tmp_path / "out.partial" / STATE_NAME).read_text())["seconds"]
    monkeypatch.setattr(run_module, "allocate", None)
    report = run(model, tmp_path / "out", tokens, resume=True)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    assert report.seconds["allocate"] == kept["allocate"] > 0
    assert report.seconds["total"] >= kept["total"] + report.seconds["layers"]
    assert report.seconds["total"] >= sum(layer.seconds for layer in report.layers) > 0


class Steps(Silent):
    """Listener that keeps the stages that have steps."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []

    def start(self, title: str, total: int, finished: int = 0) -> None:
        self.stages.append((title, total, finished))


def test_finished_layers_are_no_steps_of_the_run_that_goes_on(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    told = Steps()
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **SETTINGS, resume=True), told)
    assert told.stages == [("once more through 2 finished layers", 2, 0), ("pruning", 3, 2)]


def test_a_model_that_was_written_since_is_told_of(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    os.utime(model / "model.safetensors", ns=(1, 1))
    _, warnings = resume(model, tmp_path / "out", tokens)
    assert any(warning.startswith("model.safetensors of the model was modified after") for warning in warnings)


def test_rebuild_goes_on_too_and_notices_another_pruned_model(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "pruned", tokens, rebuild=False)
    run(model, tmp_path / "other", tokens, rebuild=False, sparsity=0.6)
    settings = {"dense": model, "pruned": tmp_path / "pruned", "calibration": tokens, "rebuild_ratio": 0.5, **SETTINGS}
    rebuild(RebuildConfig(output=tmp_path / "whole", **settings))
    whole = run_module.prune_layer
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run_module, "prune_layer", lambda job, index, *rest: whole(job, index // (1 - index), *rest))
        rebuild(RebuildConfig(output=tmp_path / "out", **settings))
    with pytest.raises(OutputError, match="another pruned model's files"):
        rebuild(RebuildConfig(output=tmp_path / "out", resume=True, **settings | {"pruned": tmp_path / "other"}))
    rebuild(RebuildConfig(output=tmp_path / "out", resume=True, **settings))
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_a_dry_run_says_where_it_would_go_on_and_writes_nothing(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
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
    with pytest.raises(OutputError, match=r"started with another --sparsity \(then 0.5, now 0.6\)"):
        planned(resume=True, sparsity=0.6)
    assert read_untimed_files(tmp_path / "out.partial") == before
    run(model, tmp_path / "out", tokens, resume=True)
    assert planned(resume=True).finished_layers == 3
    with pytest.raises(OutputError, match="exists"):
        planned()


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damaged", "layers", "settings"),
    [
        ("model-00001-of-00004", ["-0", "-1", "2"], {}),
        ("model-00002-of-00004", ["0", "1", "2"], {}),
        ("model-00002-of-00004", ["0", "1", "2"], PUBLISHED),
        ("packed-model-00003-of-00004", ["-0", "1", "2"], {"format": "packed"}),
        ("updated-00001", ["-0", "1", "2"], MASK_ALONE),
    ],
)
def test_only_layers_from_the_damage_on_are_pruned_again(
    tmp_path: Path,
    model: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: str,
    layers: list[str],
    settings: dict[str, Any],
) -> None:
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    damage(tmp_path / "out.partial" / f"{damaged}.safetensors")
    again, warnings = resume(model, tmp_path / "out", tokens, **settings)
    assert again == layers
    lost = f"{damaged}.safetensors of the unfinished run is damaged or missing: "
    assert any(warning.startswith(lost) for warning in warnings)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_a_run_of_which_only_the_end_is_missing(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(run_module, "finish_output", None)
        run(model, tmp_path / "out", tokens)
    damage(tmp_path / "out.partial" / "model-00001-of-00004.safetensors")  # outside the layers: copied again
    assert resume(model, tmp_path / "out", tokens)[0] == []
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def cut(state: Path) -> None:
    """Lose the end of the state."""
    state.write_bytes(state.read_bytes()[:-1])


def change_digit(state: Path) -> None:
    """Change an allocated sparsity; the file stays valid JSON."""
    content = json.loads(state.read_text())
    content["sparsities"] = {name: value * 0.9 for name, value in content["sparsities"].items()}
    state.write_text(json.dumps(content))


def make_pipe(state: Path) -> None:
    """Whoever opens the state waits for ever."""
    state.unlink()
    os.mkfifo(state)


def make_folder(state: Path) -> None:
    """A folder has the name of the state."""
    state.unlink()
    state.mkdir()


def of_another_version(state: Path) -> None:
    """The state is whole, and of an earlier version of the program."""
    state.write_text(json.dumps(with_digest({**json.loads(state.read_text()), "version": 7})))


@pytest.mark.parametrize("change", [cut, change_digit, make_pipe, make_folder, of_another_version])
def test_a_state_that_cannot_be_read_is_refused(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=1)
    change(tmp_path / "out.partial" / STATE_NAME)
    expected = (
        "has version 7, this program goes on with 8" if change is of_another_version else r"state\.json is damaged"
    )
    for resumed in (True, False):
        with pytest.raises(OutputError, match=expected) as caught:
            run(model, tmp_path / "out", tokens, resume=resumed)
        assert "--overwrite" in caught.value.hint
    run(model, tmp_path / "out", tokens, overwrite=True)


def test_without_a_state_it_starts_again_and_says_so(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    (tmp_path / "out.partial" / STATE_NAME).unlink()
    layers, warnings = resume(model, tmp_path / "out", tokens)
    assert layers == ["0", "1", "2"]
    assert any(warning.startswith("state.json of the unfinished run is damaged or missing: 0") for warning in warnings)


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_layer_is_computed_while_the_shard_before_it_is_written(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Not more than one shard waits to be written: the next one would take its memory, too."""
    begun = [threading.Event() for _ in range(3)]
    prune_layer, sync, writing = run_module.prune_layer, writer_module.sync_file, threading.Lock()

    def noted(job: Any, index: int, *rest: Any) -> Any:
        begun[index].set()
        return prune_layer(job, index, *rest)

    def slow(path: Path) -> str:
        assert writing.acquire(blocking=False)
        number = int(path.name.split("-of-")[0][-5:])  # 1: the tensors outside the layers
        assert number not in (2, 3) or begun[number - 1].wait(60), "a layer waits for a shard that is written before it"
        digest = sync(path)
        writing.release()
        return digest

    run(model, tmp_path / "whole", tokens, format=format)
    monkeypatch.setattr(run_module, "prune_layer", noted)
    monkeypatch.setattr(writer_module, "sync_file", slow)
    run(model, tmp_path / "out", tokens, format=format)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("place", ["sync_file", "write_state"])
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk of .* is full"), (errno.EACCES, "cannot write .*: .*denied")]
)
def test_errors_of_the_writing_thread_reach_the_run(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int, message: str
) -> None:
    """The second layer cannot be written; all that is said to be finished is durable."""
    original = getattr(writer_module, place)

    def failing(*values: Any) -> Any:
        if "-00003-of-" in values[0].name or (place == "write_state" and len(values[1].layers) > 1):
            raise OSError(number, os.strerror(number))
        return original(*values)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, place, failing)
        with pytest.raises(OutputError, match=message) as caught:
            run(model, tmp_path / "out", tokens)
    assert "go on with --resume" in caught.value.hint
    state = read_state(tmp_path / "out.partial")
    assert state is not None
    assert len(state.layers) == 1
    assert all((tmp_path / "out.partial" / name).is_file() for name in state.shards)
    assert resume(model, tmp_path / "out", tokens)[0] == ["-0", "1", "2"]
