"""A run is resumed only by a run with the same result."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llm_barber.checkpoint.digests import files_key
from llm_barber.errors import OutputError
from llm_barber.settings.presets import METHOD_FACTS, REVISIONS, Initial, Preset
from tests.conftest import make_model, save_tokens
from tests.helpers.runs import read_untimed_files, resume, run, run_stopped


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
    option = f"--{other.replace('_', '-')}"
    with nullcontext() if same else pytest.raises(OutputError, match=f"started with another {option}"):
        run(model, tmp_path / "out", tokens, resume=True, **settings, **written_out)
    if same:
        run(model, tmp_path / "whole", tokens, **settings)
        assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_the_model_may_go_by_another_name(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    monkeypatch.chdir(model.parent)
    same = {"bos": False, "samples": 99, "seed": 5}  # which the tokens do not depend on
    assert resume(Path(model.name), tmp_path / "out", Path(os.path.relpath(tokens)), **same)[0] == ["-0", "-1", "2"]


def test_what_the_preset_says_may_be_given(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    said = {"preset": "mask", "refine": "tune", "initial": "wanda", "allocation": "loss"}
    assert resume(model, tmp_path / "out", tokens, **said)[0] == ["-0", "-1", "2"]


def test_a_method_that_is_given_means_another_preset(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    with pytest.raises(OutputError, match=r"another --initial \(then the default, now wanda\)\n"):
        run(model, tmp_path / "out", tokens, resume=True, initial="wanda")


def test_the_same_tokens_in_other_windows_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    ids = load_file(tokens)["input_ids"]
    save_file({"input_ids": ids.reshape(8, -1)}, tmp_path / "other.safetensors")
    with pytest.raises(OutputError, match=r"(?m)another calibration text$"):
        run(model, tmp_path / "out", tmp_path / "other.safetensors", resume=True)


def test_refuses_what_it_cannot_go_on_with(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_stopped(monkeypatch, model, out, tokens)
    with pytest.raises(OutputError, match="unfinished run with 2 finished layers") as caught:
        run(model, out, tokens)
    assert "--resume" in caught.value.hint
    with pytest.raises(
        OutputError, match=r"(?m)another --initial \(then wanda, now magnitude\), --sparsity \(then 0.5, now 0.6\)$"
    ):
        run(model, out, tokens, resume=True, sparsity=0.6, initial="magnitude")
    other = save_tokens(tmp_path / "other.safetensors", seed=7)
    with pytest.raises(OutputError, match=r"(?m)another calibration text$"):
        run(model, out, other, resume=True)
    monkeypatch.setattr("llm_barber.run.resume_key.versions", lambda: {"torch": "0.1"})
    with pytest.raises(OutputError, match="another version of a library"):
        run(model, out, tokens, resume=True)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setitem(REVISIONS, Preset.PAPER, 0)
        with pytest.raises(OutputError, match=r"(?m)another revision of the methods$"):
            run(model, out, tokens, resume=True)
        patch.undo()
        patch.setitem(METHOD_FACTS, Initial.WANDA, replace(METHOD_FACTS[Initial.WANDA], revision=2))
        with pytest.raises(OutputError, match=r"(?m)another revision of the method wanda$"):
            run(model, out, tokens, resume=True)
    saved = shutil.copytree(model, tmp_path / "saved")
    make_model(model, "llama", num_hidden_layers=3, seed=4)
    with pytest.raises(OutputError, match="another model's files"):
        run(model, out, tokens, resume=True)
    shutil.rmtree(model)
    saved.rename(model)
    report = run(model, out, tokens, overwrite=True)  # from the beginning
    assert len(report.layers) == 3


@pytest.mark.parametrize("refine", ["tune", "swaps"])
def test_a_run_that_was_judged_otherwise_is_refused(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, refine: str
) -> None:
    """Held-out windows judge huge tokens only where layers are tuned."""
    monkeypatch.setattr("llm_barber.run.resume_key.JUDGE_REVISION", 1)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, refine=refine)
    monkeypatch.undo()
    tuned = refine == "tune"
    refused = pytest.raises(OutputError, match=r"(?m)another revision of the held-out windows$")
    with refused if tuned else nullcontext():
        run(model, tmp_path / "out", tokens, resume=True, refine=refine)


def test_source_key_sees_any_sampled_change(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    first = files_key(tmp_path.iterdir())
    assert files_key(tmp_path.iterdir()) == first
    (tmp_path / "model.safetensors").write_bytes(bytes(range(255, -1, -1)) * 2000)
    assert files_key(tmp_path.iterdir()) != first
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert files_key(tmp_path.iterdir()) != first
