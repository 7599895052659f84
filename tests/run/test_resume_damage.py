"""Damaged files of an unfinished run cost the layers that they held, and no more."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_barber.checkpoint.digests import with_digest
from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME
from llm_barber.errors import OutputError
from tests.helpers.resumed_runs import check_resumed, record_passed_layers, record_pruned_layers, resume_warnings
from tests.helpers.runs import read_untimed_files, run, run_stopped


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
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1], **settings)


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
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1])


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
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1])  # from the state before
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
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [] if name == STATE_BEFORE else [1])


def test_an_edited_version_of_the_state_is_noticed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    state = tmp_path / "out.partial" / STATE_NAME
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "version": 5}))
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1])


def test_a_state_of_an_earlier_version_is_gone_on_with(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In version 6, files of activations had a sha256."""
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    work = tmp_path / "out.partial"
    for state in (work / STATE_NAME, work / STATE_BEFORE):
        content = json.loads(state.read_text())
        for saved in content["activations"]:
            del saved["xxh3_128"]
            saved["sha256"] = hashlib.sha256((work / saved["file"]).read_bytes()).hexdigest()
        state.write_text(json.dumps(with_digest({**content, "version": 6})))
    copied = shutil.copytree(work, tmp_path / "later.partial")
    check_resumed(monkeypatch, tmp_path, model, tokens, [2])
    monkeypatch.undo()
    for state in (copied / STATE_NAME, copied / STATE_BEFORE):
        content = json.loads(state.read_text())
        state.write_text(json.dumps(with_digest({**content, "version": 8})))
    with pytest.raises(OutputError, match="has version 8, this program goes on with 7") as caught:
        run(model, tmp_path / "later", tokens, resume=True)
    assert "--overwrite" in caught.value.hint


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
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [1])


def test_without_any_state_it_starts_again_and_says_so(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    for name in (STATE_NAME, STATE_BEFORE):
        (tmp_path / "out.partial" / name).unlink()
    warnings = resume_warnings(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    assert [
        warning
        for warning in warnings
        if warning.startswith("state.json of the unfinished run is damaged or missing: 0")
    ]


def test_with_the_first_layer_damaged_it_starts_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"initial": "wanda", "rebuild": False}  # no allocation, which would stay
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, layers=1, **settings)
    _, first = sorted((tmp_path / "out.partial").glob("model-*"))
    damage(first)
    check_resumed(monkeypatch, tmp_path, model, tokens, [0, 1, 2], **settings)


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
    """From the first layer on, the streams pass again through the whole layers before the damage."""
    run(model, tmp_path / "whole", tokens, **settings)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    lost = [path for start in damaged for path in sorted((tmp_path / "out.partial").glob(f"{start}*"))]
    for path in lost:
        damage(path)
    pruned_layers, through = record_pruned_layers(monkeypatch), record_passed_layers(monkeypatch)
    warnings = resume_warnings(model, tmp_path / "out", tokens, **settings)
    assert pruned_layers == list(range(finished, 3))
    assert through == list(range(finished))
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    (message,) = (warning for warning in warnings if f"damaged or missing: {finished} finished layers" in warning)
    assert lost[0].name in message


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_shard_costs_what_it_held(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer is pruned again; tensors outside the layers are copied again, even with all finished."""
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    outside, *layers = sorted((tmp_path / "out.partial").glob("model-*"))
    assert len(layers) == 2
    damage(outside)
    damage(layers[1])
    check_resumed(monkeypatch, tmp_path, model, tokens, [1, 2])
    monkeypatch.undo()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_barber.run.stream.finish_output", killed)
    last = "model-00004-of-00004.safetensors"
    for damaged, computed in ((outside.name, []), (layers[1].name, [1, 2]), (last, [2])):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "late", tokens, resume=True)
        damage(tmp_path / "late.partial" / damaged)
        again = record_pruned_layers(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "late", tokens, resume=True)
        assert again == computed
    monkeypatch.undo()
    run(model, tmp_path / "late", tokens, resume=True)
    assert read_untimed_files(tmp_path / "late") == read_untimed_files(tmp_path / "whole")
