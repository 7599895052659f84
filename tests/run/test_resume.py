"""A run that is killed at any moment goes on to the same bytes."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import PruneConfig, RebuildConfig, prune, rebuild
from llm_barber.checkpoint import activations as activations_module
from llm_barber.checkpoint import durable as durable_module
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.companions import LOCK_NAME, REPLACED
from llm_barber.checkpoint.digests import files_key, with_digest
from llm_barber.checkpoint.folder import locked
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME, Used, read_state
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import BarberError, ModelError, OutputError
from llm_barber.progress import Silent
from llm_barber.run import resuming as resuming_module
from llm_barber.run import stream as run_module
from llm_barber.run.dry_run import DryRun, dry_run
from llm_barber.settings.presets import REVISIONS, Preset
from tests.conftest import Listener, make_model, save_tokens
from tests.helpers.runs import SETTINGS, read_untimed_files, read_untimed_record, run, run_killed_at, run_stopped


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)


MASK_ALONE: dict[str, Any] = {"initial": "sparsegpt", "rebuild": False, "pattern": "2:4"}


@pytest.mark.parametrize(
    "settings",
    [
        {"rebuild_ratio": 0.5},
        {"preset": "best", "target_mix": 0.5, "guard": 0.25},
        {**MASK_ALONE, "format": "packed", "prune_head": True},
    ],
    ids=["paper", "best", "SparseGPT's mask"],
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
            assert computed[0] >= reached
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


@pytest.mark.parametrize(
    ("settings", "written_out", "same"),
    [
        ({"pattern": "2:4"}, {"target_mix": 0.75}, True),
        ({"pattern": "2:4", "prune_head": True}, {"target_mix": 0.75}, False),  # the head's is 0.5, unless one is given
        ({"refine": "swaps"}, {"swaps": 100}, True),
        ({"refine": "swaps", "sparsities": {"0": "2:4"}}, {"swaps": 100}, False),  # with N:M 400
    ],
)
def test_what_a_default_says_may_be_given(
    tmp_path: Path,
    model: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    written_out: dict[str, Any],
    same: bool,
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=1, **settings)
    (other,) = written_out
    with nullcontext() if same else pytest.raises(OutputError, match=f"started with another {other}"):
        run(model, tmp_path / "out", tokens, resume=True, **settings, **written_out)
    if same:
        run(model, tmp_path / "whole", tokens, **settings)
        assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, index: Callable[[Any], int]) -> list[int]:
    """The layers that a function is called for from now on, by its second argument."""
    whole = getattr(module, name)
    found: list[int] = []

    def count(job: Any, layer: Any, *values: Any) -> Any:
        found.append(index(layer))
        return whole(job, layer, *values)

    monkeypatch.setattr(module, name, count)
    return found


def counted_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are computed from now on."""
    return counted(monkeypatch, run_module, "prune_layer", lambda index: index)


def passed_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The finished layers that the streams go through once more from now on."""
    return counted(monkeypatch, resuming_module, "pass_layer", lambda result: result.index)


def goes_on(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    model: Path,
    tokens: Path,
    computed: list[int],
    passed: Sequence[int] = (),
    **settings: Any,
) -> None:
    """Resume the run in `out`: these layers are computed, through those the streams go, the weights are `whole`'s."""
    found, through = counted_layers(monkeypatch), passed_layers(monkeypatch)
    run(model, folder / "out", tokens, resume=True, **settings)
    assert found == computed
    assert through == list(passed)
    assert read_untimed_files(folder / "out") == read_untimed_files(folder / "whole")


def test_only_what_is_missing_is_computed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    found = counted_layers(monkeypatch)
    report = run(model, tmp_path / "out", tokens, resume=True)
    assert found == [2]
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
    """Keeps the stages that have steps, and how many of these are told."""

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


@pytest.mark.parametrize(
    "settings", [{}, {"initial": "wanda"}, {"format": "packed"}], ids=["mask", "published", "packed"]
)
def test_a_damaged_file_of_activations_costs_one_pass_through_a_layer(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    newest = max((tmp_path / "out.partial").glob("activations-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [1], **settings)


def test_the_dense_stream_goes_through_a_finished_layer_in_the_same_batches(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where linears are refined, held-out windows are apart; this model's layers round otherwise by batch size."""
    settings = {"initial": "wanda", "refine": "swaps", "reconstruct": "least-squares"}
    jamba = make_model(tmp_path / "jamba", "jamba")
    run(jamba, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, jamba, tmp_path / "out", tokens, layers=1, **settings)
    next((tmp_path / "out.partial").glob("activations-*")).unlink()
    found = passed_layers(monkeypatch)
    run(jamba, tmp_path / "out", tokens, resume=True, **settings)
    assert found == [0]
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("initial", ["sparsegpt", "alps"])
def test_layers_whose_output_cannot_be_made_again_are_pruned_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, initial: str
) -> None:
    """Updated weights made it, and dense ones are written."""
    settings = {**MASK_ALONE, "initial": initial}
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    newest = max((tmp_path / "out.partial").glob("activations-*"))
    newest.unlink()
    goes_on(monkeypatch, tmp_path, model, tokens, [1, 2], **settings)
    monkeypatch.undo()
    for kept in ({"keep_updates": True}, {"rebuild": True}, {"refine": "swaps"}):
        shutil.rmtree(tmp_path / "whole")
        run(model, tmp_path / "whole", tokens, **{**settings, **kept})
        shutil.rmtree(tmp_path / "out")
        run_stopped(monkeypatch, model, tmp_path / "out", tokens, **{**settings, **kept})
        max((tmp_path / "out.partial").glob("activations-*")).unlink()
        goes_on(monkeypatch, tmp_path, model, tokens, [2], [1], **{**settings, **kept})
        monkeypatch.undo()


@pytest.mark.parametrize("lost", ["cut", "gone"])
def test_a_damaged_state_costs_one_pass_through_a_layer(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    state = tmp_path / "out.partial" / STATE_NAME
    if lost == "cut":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        state.unlink()
    with pytest.raises(OutputError, match="2 finished layers"):
        run(model, tmp_path / "out", tokens)
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [1])


def edit_sparsity(state: Path) -> None:
    """Change a digit of an allocated sparsity; the file stays valid JSON."""
    content = json.loads(state.read_text())
    name, value = next(iter(content["sparsities"].items()))
    content["sparsities"][name] = value * 0.9
    state.write_text(json.dumps(content))


def test_a_changed_digit_in_the_state_is_noticed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    edit_sparsity(tmp_path / "out.partial" / STATE_NAME)
    edit_both = tmp_path / "both.partial"
    shutil.copytree(tmp_path / "out.partial", edit_both)
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [1])  # from the state before
    monkeypatch.undo()
    edit_sparsity(edit_both / STATE_BEFORE)
    with pytest.raises(OutputError, match=r"state\.json is damaged"):
        run(model, tmp_path / "both", tokens, resume=True)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", [STATE_NAME, STATE_BEFORE, "activations-00002.safetensors"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_counts_as_damaged(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    path = tmp_path / "out.partial" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [] if name == STATE_BEFORE else [1])


def test_an_edited_version_of_the_state_is_noticed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    state = tmp_path / "out.partial" / STATE_NAME
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "version": 5}))
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [1])


def test_a_shard_that_the_state_miscounts_is_noticed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    work = tmp_path / "out.partial"
    for state in (work / STATE_NAME, work / STATE_BEFORE):
        content = json.loads(state.read_text())
        content["layers"][0]["blocks"][0]["linears"][0]["zeros"] += 1
        state.write_text(json.dumps(with_digest(content)))
    for activations in work.glob("activations-*"):
        activations.unlink()  # so that the shard is read again
    with pytest.raises(OutputError, match=r"layer 0 self_attn\.q_proj .* has \d+ zeros, state\.json says"):
        run(model, tmp_path / "out", tokens, resume=True)


def test_a_kill_after_a_damaged_state_was_taken_up(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the next state is written, a whole one stays."""
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for damaged in (False, True):
        if damaged:
            (tmp_path / "out.partial" / STATE_NAME).write_text("{")
        with monkeypatch.context() as patch:
            place = "llm_barber.checkpoint.state.write_durably" if damaged else "llm_barber.run.stream.prune_layer"
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                run(model, tmp_path / "out", tokens, resume=True)
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [1])


def test_without_any_state_it_starts_again_and_says_so(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    for name in (STATE_NAME, STATE_BEFORE):
        (tmp_path / "out.partial" / name).unlink()
    warnings = warnings_of_resumed(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    assert [one for one in warnings if one.startswith("state.json of the unfinished run is damaged or missing: 0")]


def test_with_the_first_layer_damaged_it_starts_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"initial": "wanda", "rebuild": False}  # no allocation, which would stay
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=1, **settings)
    _, first = sorted((tmp_path / "out.partial").glob("model-*"))
    damage(first)
    goes_on(monkeypatch, tmp_path, model, tokens, [0, 1, 2], **settings)


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_what_is_written_already_needs_no_room_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """A packed shard stands for its unpacked bytes: the rest is counted unpacked."""
    run(model, tmp_path / "whole", tokens, format=format)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, format=format)
    written = sum(path.stat().st_size for path in (tmp_path / "out.partial").glob("*model*.safetensors"))
    if format == "packed":
        packed, written = written, sum(shard.bytes for shard in read_state(tmp_path / "out.partial").shards.values())
        assert packed < written
    every = CheckpointSource(model).bytes
    assert 0 < written < every
    free = every - written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    goes_on(monkeypatch, tmp_path, model, tokens, [2], format=format)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(OutputError, match="the disk of"):
        run(model, tmp_path / "other", tokens)


def test_a_model_that_was_written_since_is_told_of(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    os.utime(model / "model.safetensors", ns=(1, 1))
    warnings = warnings_of_resumed(model, tmp_path / "out", tokens)
    assert [one for one in warnings if one.startswith("model.safetensors of the model came here since")]


def test_what_could_not_be_kept_is_not_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm_barber.checkpoint.writer.write_state", full)
    with pytest.raises(OutputError, match="is full"), CheckpointWriter(tmp_path / "out", 2, False, 0) as writer:
        writer.write_shard({"a": torch.ones(1)})
        writer.finish_layer({}, {}, Used())
    assert not writer.resumable
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_by_whoever_writes_no_model(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="the disk of /any is full; activations") as caught,
        Follower(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/any")
    assert "--resume" in caught.value.hint


@pytest.mark.parametrize("settings", [{}, {"initial": "wanda"}], ids=["allocated", "published"])
@pytest.mark.parametrize(
    ("damaged", "finished"),
    [(["model-00002"], 0), (["activations"], 2), (["model-00003", "activations"], 1)],
    ids=["first layer", "activations", "second layer and activations"],
)
def test_only_layers_from_the_damage_on_are_pruned_again(
    tmp_path: Path,
    model: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: list[str],
    finished: int,
    settings: dict[str, Any],
) -> None:
    """To what is before it, and whole, the streams go from the first layer on."""
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    lost = [one for start in damaged for one in sorted((tmp_path / "out.partial").glob(f"{start}*"))]
    for one in lost:
        damage(one)
    found, through = counted_layers(monkeypatch), passed_layers(monkeypatch)
    warnings = warnings_of_resumed(model, tmp_path / "out", tokens, **settings)
    assert found == list(range(finished, 3))
    assert through == list(range(finished))
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    (message,) = (one for one in warnings if f"damaged or missing: {finished} finished layers" in one)
    assert lost[0].name in message


def warnings_of_resumed(model: Path, out: Path, tokens: Path, **settings: Any) -> list[str]:
    """What a run that goes on warns of."""
    told = Listener()
    config = PruneConfig(model=model, output=out, calibration=tokens, resume=True, **{**SETTINGS, **settings})
    prune(config, told)
    return told.warnings


def damage(path: Path) -> None:
    """Change its last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_activations_are_written_while_the_next_layer_is_computed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes, they are kept as they were."""
    run(model, tmp_path / "whole", tokens)
    save, prune_layer = writer_module.save_activations, run_module.prune_layer
    begun = [threading.Event() for _ in range(3)]
    kept: dict[int, bytes] = {}

    def slow(folder: Path, layers: int, streams: Any) -> Any:
        assert begun[layers].wait(60)
        time.sleep(0.3)
        saved = save(folder, layers, streams)
        kept[layers] = (folder / saved.file).read_bytes()
        return saved

    def noted(job: Any, index: int, *rest: Any) -> Any:
        begun[index].set()
        return prune_layer(job, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "save_activations", slow)
        patch.setattr(run_module, "prune_layer", noted)
        run(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    run_stopped(monkeypatch, model, tmp_path / "again", tokens)
    for layers, content in kept.items():
        assert (tmp_path / "again.partial" / f"activations-{layers:05d}.safetensors").read_bytes() == content
    assert kept.keys() == {1, 2}


def test_activations_may_take_longer_to_write_than_the_next_layer_to_compute(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is finished meanwhile; then its own wait."""
    run(model, tmp_path / "whole", tokens)
    finished, sync, finish = (
        [threading.Event() for _ in range(4)],
        activations_module.sync_file,
        CheckpointWriter.finish_layer,
    )

    def slow(path: Path) -> str:
        if path.name.startswith("activations-"):
            after = int(path.name[12:17])
            assert finished[after + 1].wait(60)
        return sync(path)

    def noted(self: CheckpointWriter, result: Any, *rest: Any) -> None:
        finish(self, result, *rest)
        finished[len(self.state.layers)].set()

    with monkeypatch.context() as patch:
        patch.setattr(activations_module, "sync_file", slow)
        patch.setattr(CheckpointWriter, "finish_layer", noted)
        run(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_a_damaged_shard_costs_what_it_held(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's is pruned again; what is outside the layers is copied again, even with all layers finished."""
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    outside, *layers = sorted((tmp_path / "out.partial").glob("model-*"))
    assert len(layers) == 2
    damage(outside)
    damage(layers[1])
    goes_on(monkeypatch, tmp_path, model, tokens, [1, 2])
    monkeypatch.undo()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_barber.run.stream.finish_output", killed)
    last = "model-00004-of-00004.safetensors"
    for damaged, computed in ((outside.name, []), (layers[1].name, [1, 2]), (last, [2])):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "late", tokens, resume=True)
        damage(tmp_path / "late.partial" / damaged)
        again = counted_layers(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "late", tokens, resume=True)
        assert again == computed
    monkeypatch.undo()
    run(model, tmp_path / "late", tokens, resume=True)
    assert read_untimed_files(tmp_path / "late") == read_untimed_files(tmp_path / "whole")


def test_an_allocation_is_not_made_twice(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"preset": "mask"}
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=0, **settings)
    monkeypatch.setattr("llm_barber.run.stream.allocate", None)
    run(model, tmp_path / "out", tokens, resume=True, **settings)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_the_model_may_go_by_another_name(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    monkeypatch.chdir(model.parent)
    found = counted_layers(monkeypatch)
    same = {"bos": False, "samples": 99, "seed": 5}  # which the tokens do not depend on
    run(Path(model.name), tmp_path / "out", Path(os.path.relpath(tokens)), resume=True, **same)
    assert found == [2]


def test_what_the_preset_says_may_be_given(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    found = counted_layers(monkeypatch)
    run(model, tmp_path / "out", tokens, resume=True, preset="mask", refine="tune", initial="wanda", allocation="loss")
    assert found == [2]


def test_the_same_tokens_in_other_windows_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    ids = load_file(tokens)["input_ids"]
    save_file({"input_ids": ids.reshape(8, -1)}, tmp_path / "other.safetensors")
    with pytest.raises(OutputError, match="another calibration text$"):
        run(model, tmp_path / "out", tmp_path / "other.safetensors", resume=True)


def test_refuses_what_it_cannot_go_on_with(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_stopped(monkeypatch, model, out, tokens)
    with pytest.raises(OutputError, match="unfinished run with 2 finished layers") as caught:
        run(model, out, tokens)
    assert "--resume" in caught.value.hint
    with pytest.raises(OutputError, match="another initial, sparsity$"):
        run(model, out, tokens, resume=True, sparsity=0.6, initial="magnitude")
    other = save_tokens(tmp_path / "other.safetensors", seed=7)
    with pytest.raises(OutputError, match="another calibration text$"):
        run(model, out, other, resume=True)
    monkeypatch.setattr("llm_barber.run.resume_key.versions", lambda: {"torch": "0.1"})
    with pytest.raises(OutputError, match="another version of a library"):
        run(model, out, tokens, resume=True)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setitem(REVISIONS, Preset.PAPER, 0)
        with pytest.raises(OutputError, match="another revision of the methods$"):
            run(model, out, tokens, resume=True)
    saved = shutil.copytree(model, tmp_path / "saved")
    make_model(model, "llama", num_hidden_layers=3, seed=4)
    with pytest.raises(OutputError, match="another model's files"):
        run(model, out, tokens, resume=True)
    shutil.rmtree(model)
    saved.rename(model)
    for name in (STATE_NAME, STATE_BEFORE):
        (out.with_name("out.partial") / name).write_text("{")
    with pytest.raises(OutputError, match="state.json is damaged"):
        run(model, out, tokens, resume=True)
    found = counted_layers(monkeypatch)
    run(model, out, tokens, overwrite=True)  # from the beginning
    assert found == [0, 1, 2]


def test_a_full_disk_and_a_lost_source_leave_what_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(model, tmp_path / "whole", tokens)
    save = durable_module.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        if path.name.startswith("activations-00001"):  # while the second layer is computed
            raise OSError(28, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(durable_module, "save_file", full)
    with pytest.raises(OutputError, match="disk of .* is full") as caught:
        run(model, out, tokens)
    assert "--resume" in caught.value.hint
    monkeypatch.undo()
    goes_on(monkeypatch, tmp_path, model, tokens, [2], [0, 1])  # the second layer is finished, too
    monkeypatch.undo()

    from llm_barber.checkpoint.source import CheckpointSource

    read, reads = CheckpointSource.read, 0

    def lost(self: CheckpointSource, names: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            (model / "model.safetensors").rename(tmp_path / "elsewhere")
        return read(self, names)

    monkeypatch.setattr(CheckpointSource, "read", lost)
    with pytest.raises(BarberError) as gone:
        run(model, tmp_path / "again", tokens)
    assert isinstance(gone.value, ModelError)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(model / "model.safetensors")
    run(model, tmp_path / "again", tokens, resume=True)
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(out)


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


def test_source_key_sees_any_sampled_change(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    first = files_key(tmp_path.iterdir())
    assert files_key(tmp_path.iterdir()) == first
    (tmp_path / "model.safetensors").write_bytes(bytes(range(255, -1, -1)) * 2000)
    assert files_key(tmp_path.iterdir()) != first
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert files_key(tmp_path.iterdir()) != first


def test_a_kill_when_the_output_has_its_name(tmp_path: Path, model: Path, tokens: Path) -> None:
    """All that was left to do is to remove the state and the lock."""
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    before = read_untimed_files(tmp_path / "out")
    for name in (STATE_NAME, STATE_BEFORE, "llm-barber.lock"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        prune(PruneConfig(**settings, resume=True, rebuild_ratio=0.5))  # another run
    assert prune(PruneConfig(**settings, resume=True)) == report
    assert read_untimed_files(tmp_path / "out") == before
    assert prune(PruneConfig(**settings, resume=True)) == report  # a finished job, queued again
    with pytest.raises(OutputError, match="exists"):
        prune(PruneConfig(**settings, resume=True, rebuild_ratio=0.5))


def test_a_finished_job_is_not_taken_for_one_of_other_files(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    again = PruneConfig(**settings, resume=True)
    before = tokens.read_bytes()
    save_tokens(tokens, seed=99)
    with pytest.raises(OutputError, match="is complete, but was made with another calibration text than is there now"):
        prune(again)
    tokens.unlink()
    assert prune(again) == report  # nothing to compare with
    tokens.write_bytes(before)
    assert prune(again) == report
    (shard,) = model.glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(OutputError, match="is complete, but was made with other files of .* than is there now"):
        prune(again)


def test_what_a_killed_replacement_left_is_removed(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {
        "model": model,
        "output": tmp_path / "out",
        "calibration": tokens,
        "initial": "magnitude",
    }
    prune(PruneConfig(**settings))
    (tmp_path / "out" / REPLACED).touch()
    (tmp_path / "out").rename(tmp_path / "out.replaced-123")
    (tmp_path / "other.replaced-123").mkdir()
    prune(PruneConfig(**settings))
    assert {path.name for path in tmp_path.glob("o*")} == {"out", "other.replaced-123"}


def test_a_dry_run_says_where_it_would_go_on_and_writes_nothing(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    (tmp_path / "out.partial" / STATE_NAME).write_text("{")  # the state before is taken
    before = read_untimed_files(tmp_path / "out.partial")

    def planned(**settings: Any) -> DryRun:
        given = {**SETTINGS, "model": model, "output": tmp_path / "out", "calibration": tokens, **settings}
        return dry_run(PruneConfig(**given))

    found = planned(resume=True)
    assert found.finished_layers == 2
    assert ("goes on", "after 2 of 3 layers, if their files are whole") in found.rows()
    assert planned(overwrite=True).finished_layers == 0
    with locked(tmp_path / "out.partial" / LOCK_NAME), pytest.raises(OutputError, match="another run is writing"):
        planned(resume=True)
    with pytest.raises(OutputError, match="unfinished run with 2 finished layers"):
        planned()
    with pytest.raises(OutputError, match="started with another sparsity"):
        planned(resume=True, sparsity=0.6)
    with pytest.raises(OutputError, match="started with another target_mix"):
        planned(resume=True, target_mix=0.75)
    assert planned(resume=True, target_mix=0.5).finished_layers == 2
    assert read_untimed_files(tmp_path / "out.partial") == before
    run(model, tmp_path / "out", tokens, resume=True)
    assert planned(resume=True).finished_layers == 3
    with pytest.raises(OutputError, match="exists"):
        planned()
