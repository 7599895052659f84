"""A finished run that is started again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import PackConfig, PruneConfig, RebuildConfig, hold_zeros, pack, prune, rebuild, save_finetuned
from llm_barber.checkpoint import gguf
from llm_barber.checkpoint.companions import REPLACED
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.errors import OutputError
from llm_barber.run import finished
from tests.conftest import Listener, load_model, save_tokens
from tests.helpers.runs import read_untimed_files
from tests.helpers.text import add_tokenizer


def test_a_kill_when_the_output_has_its_name(tmp_path: Path, model: Path, tokens: Path) -> None:
    """All that was left to do is to remove the state and the lock."""
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    before = read_untimed_files(tmp_path / "out")
    for name in (STATE_NAME, "llm-barber.lock"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(OutputError, match="by a run with other settings: --rebuild-ratio .then the default, now 0.5"):
        prune(PruneConfig(**settings, resume=True, rebuild_ratio=0.5))  # another run
    assert prune(PruneConfig(**settings, resume=True)) == report
    assert read_untimed_files(tmp_path / "out") == before
    assert prune(PruneConfig(**settings, resume=True)) == report  # a finished job, queued again
    with pytest.raises(OutputError, match="is complete, by a run with other settings"):
        prune(PruneConfig(**settings, resume=True, rebuild_ratio=0.5))


def test_a_finished_job_is_not_taken_for_one_of_other_files(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    again = PruneConfig(**settings, resume=True)
    before = tokens.read_bytes()
    save_tokens(tokens, seed=99)
    with pytest.raises(OutputError, match="is complete, but was made with another calibration text"):
        prune(again)
    tokens.unlink()
    assert prune(again) == report  # nothing to compare with
    tokens.write_bytes(before)
    assert prune(again) == report
    (shard,) = model.glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(OutputError, match="is complete, but was made with other files of "):
        prune(again)


def test_the_same_run_in_other_words(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with a copy of the text, and with what the preset decides said aloud."""
    monkeypatch.chdir(tmp_path)
    report = prune(PruneConfig(model=model.name, output="out", calibration=tokens.name))
    assert (report.model, report.settings["calibration"]) == (str(model), str(tokens))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    copy = tokens.rename(tmp_path / "copy.safetensors")
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = {"model": f"../{model.name}", "output": tmp_path / "moved", "calibration": copy, "resume": True}
    assert prune(PruneConfig(**moved)) == report.model_copy(update={"output": str(tmp_path / "moved")})
    (tmp_path / "moved").rename(tmp_path / "out")
    said: dict[str, Any] = {"preset": "mask", "refine": "tune", "sparsity": 0.5, "allocation": "loss", "guard": 1 / 32}
    for settings in ({}, said, {"tune_passes": report.resolved["tune_passes"]}, {"seed": 7}):
        again = {"model": f"../{model.name}", "output": tmp_path / "out", "calibration": copy, "resume": True}
        assert prune(PruneConfig(**again | settings)) == report
    for other in ({"initial": "wanda"}, {"preset": "best"}, {"sparsity": 0.6}, {"guard": 0}, {"tune_passes": 1}):
        with pytest.raises(OutputError, match="is complete, by a run with other settings"):
            prune(PruneConfig(**again | other))


def test_what_is_said_aloud_may_be_left_out(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings, preset="paper", sparsity=0.5, rebuild=True))
    assert prune(PruneConfig(**settings, resume=True)) == report


def test_a_model_that_is_gone_is_compared_by_its_name(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"output": "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(model=model.name, **settings))
    model.rename(tmp_path / "moved")
    told = Listener()
    assert prune(PruneConfig(model=model.name, **settings, resume=True), told) == report
    assert any("is not there any more" in warning for warning in told.warnings)
    with pytest.raises(OutputError, match=f"was made with MODEL .then {model}, now org/name"):
        prune(PruneConfig(model="org/name", **settings, resume=True))


def test_a_finished_run_of_other_files_may_be_overwritten(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    save_tokens(tokens, seed=99)
    again = prune(PruneConfig(**settings, resume=True, overwrite=True))
    assert again.calibration.sha256 != report.calibration.sha256


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"sparsities": {"q_proj": 0.3, "self_attn": 0.7}}, {"sparsities": {"self_attn": 0.7, "q_proj": 0.3}}),
        ({"sparsities": {"q_proj": "2:4"}, "initial": "sparsegpt"}, {"granularity": "linear"}),
        ({"pattern": "2:4"}, {"reorder": False}),
        ({"pattern": "2:4"}, {"pattern": "4:8"}),
        ({"prune_head": True}, {"target_mix": 0.5}),
    ],
    ids=str,
)
def test_other_runs_whose_settings_look_alike(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, Any], other: dict[str, Any]
) -> None:
    again: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, **settings}
    report = prune(PruneConfig(**again))
    assert prune(PruneConfig(**again, resume=True)) == report
    with pytest.raises(OutputError, match="is complete, by a run with other settings"):
        prune(PruneConfig(**again | other, resume=True))


def test_a_rebuild_by_another_method(tmp_path: Path, model: Path, tokens: Path) -> None:
    """The method decides which groups compete, and how many swap."""
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, initial="magnitude", rebuild=False))
    again: dict[str, Any] = {"dense": model, "pruned": tmp_path / "pruned", "calibration": tokens}
    again |= {"output": tmp_path / "out"}
    report = rebuild(RebuildConfig(**again, initial="wanda"))
    assert rebuild(RebuildConfig(**again, initial="wanda", resume=True)) == report
    for initial in (None, "magnitude"):
        with pytest.raises(OutputError, match="other settings: --initial"):
            rebuild(RebuildConfig(**again, initial=initial, resume=True))


def test_what_other_commands_made_of_an_output_is_not_the_run_s(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "calibration": tokens, "initial": "wanda"}
    prune(PruneConfig(**settings, output=tmp_path / "out"))
    trained = load_model(tmp_path / "out")
    hold_zeros(trained)
    with torch.no_grad():
        trained.model.norm.weight.add_(1)
    save_finetuned(trained, tmp_path / "fine-tuned since")
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "packed since"))
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "rounded since", values="int8"))
    for name in ("fine-tuned since", "packed since", "rounded since"):
        with pytest.raises(OutputError, match=f"is complete, but was {name}"):
            prune(PruneConfig(**settings, output=tmp_path / name, resume=True))


def test_a_text_that_is_there_and_cannot_be_read_is_another(tmp_path: Path, model: Path, tokens: Path) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    prune(PruneConfig(**settings))
    tokens.write_bytes(b"junk")
    with pytest.raises(OutputError, match="was made with another calibration text: "):
        prune(PruneConfig(**settings, resume=True))


def test_a_relative_text_that_is_gone_is_compared_by_its_name(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"model": model, "output": "out", "calibration": tokens.name, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    tokens.unlink()
    assert prune(PruneConfig(**settings, resume=True)) == report


def test_a_record_without_a_newer_setting_is_of_the_same_run(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": model, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    assert report.settings.pop("target_mix", 0) is None
    assert report.settings.pop("include") == []
    monkeypatch.setattr(finished, "read_record", lambda _: report)
    assert prune(PruneConfig(**settings, resume=True)) == report


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


def test_a_text_is_compared_without_the_model(tmp_path: Path, model: Path) -> None:
    """The output has the tokenizer: the model's folder may be gone, as a model of the hub is elsewhere."""
    add_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (7 * i * i + i) % 90) for i in range(400)))
    settings: dict[str, Any] = {
        "model": model, "output": tmp_path / "out", "calibration": text, "samples": 3, "seqlen": 24, "initial": "wanda",
    }  # fmt: skip
    report = prune(PruneConfig(**settings))
    again = PruneConfig(**settings, resume=True)
    model.rename(tmp_path / "elsewhere")
    told = Listener()
    assert prune(again, told) == report
    assert any("is not there any more" in warning for warning in told.warnings)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(OutputError, match="is complete, but was made with another calibration text"):
        prune(again)


def test_a_gguf_file_is_compared_with_the_one_that_was_read(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", lambda path, folder: shutil.copytree(model, folder, dirs_exist_ok=True))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    settings: dict[str, Any] = {"model": file, "output": tmp_path / "out", "calibration": tokens, "initial": "wanda"}
    report = prune(PruneConfig(**settings))
    again = PruneConfig(**settings, resume=True)
    shutil.rmtree(tmp_path / "cache")  # it is converted again, at another time
    told = Listener()
    assert prune(again, told) == report
    assert not any("modified" in warning for warning in told.warnings)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert prune(again, told) == report
    assert any("cannot be compared" in warning for warning in told.warnings)
    (tmp_path / "cache").unlink()
    (shard,) = model.glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    file.write_bytes(b"GGUF of another model")
    with pytest.raises(OutputError, match="is complete, but was made with other files of "):
        prune(again)
