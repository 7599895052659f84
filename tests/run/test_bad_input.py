"""Models, texts and settings that cannot be pruned: the message says why, and nothing is left."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llm_barber import PruneConfig
from llm_barber.errors import CalibrationError, ModelError, OutputError, SettingsError
from tests.conftest import change_json, save_tokens
from tests.helpers.failing_runs import expect_failure
from tests.helpers.prune_runs import run


def test_bad_input_says_what_is_wrong_and_leaves_nothing(tmp_path: Path, llama: Path, tokens: Path) -> None:
    good = {"model": str(llama), "calibration": str(tokens)}
    expect_failure("no such model", ModelError, tmp_path, **good | {"model": str(tmp_path / "nothing")})
    expect_failure("pattern 2:5 does not divide the 32 inputs of", ModelError, tmp_path, **good, pattern="2:5")
    error = expect_failure("beyond the model's 64 positions", CalibrationError, tmp_path, model=str(llama), seqlen=65)
    assert error.hint == "give --seqlen 64, or less"
    long = save_tokens(tmp_path / "long.safetensors", tokens=65)
    error = expect_failure("beyond the model's 64", CalibrationError, tmp_path, model=str(llama), calibration=str(long))
    assert error.hint == "make a file with windows of 64 tokens or less"
    expect_failure("device cuda:7: PyTorch sees|unknown device", SettingsError, tmp_path, **good, device="cuda:7")
    expect_failure("no tokenizer", CalibrationError, tmp_path, model=str(llama), seqlen=8)
    big = save_tokens(tmp_path / "big.safetensors", vocabulary=5000)
    expect_failure(
        "outside the model's vocabulary of 128", CalibrationError, tmp_path, **good | {"calibration": str(big)}
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    expect_failure("exists", OutputError, tmp_path, **good, output=tmp_path / "there")
    change_json(llama / "config.json", model_type="bert")
    error = expect_failure("bert is an encoder", ModelError, tmp_path, **good)
    assert "decoder models" in error.hint


def test_odd_outputs(tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    assert run(llama, tmp_path / "link", tokens).output == str(tmp_path / "real")
    assert run(llama, tmp_path / "link", tokens, overwrite=True, rebuild=False).swapped == 0
    assert run(llama, tmp_path / "dangling", tokens).output == str(tmp_path / "later")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    with pytest.raises(SettingsError, match="contains MODEL"):
        run(shutil.copytree(llama, tmp_path / "models" / "a"), tmp_path / "models", tokens)
    shutil.copytree(llama, tmp_path / "x.partial")
    expect_failure("is in the way", OutputError, tmp_path, model=tmp_path / "x.partial", output=tmp_path / "x")
    with pytest.raises(SettingsError, match="OUT"):
        PruneConfig(model="m", output=None)


def test_activations_that_overflow_are_named(tmp_path: Path, llama: Path, tokens: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3e38
    tensors["model.layers.1.mlp.down_proj.weight"].clamp_(-3e38, 3e38)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    for rebuilt in (True, False):
        error = expect_failure(
            "the output of layer 1 mlp holds NaN or Inf", ModelError, tmp_path,
            model=str(llama), calibration=str(tokens), rebuild=rebuilt,
        )  # fmt: skip
        assert "--dtype" in error.hint


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_inputs_of_a_linear_that_overflow_are_named(tmp_path: Path, llama: Path, tokens: Path, method: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e38
    tensors["model.layers.1.mlp.up_proj.weight"].clamp_(-3e38, 3e38)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    expect_failure(
        "the input of layer 1 mlp.down_proj holds NaN or Inf", ModelError, tmp_path,
        model=str(llama), calibration=str(tokens), initial=method,
    )  # fmt: skip
