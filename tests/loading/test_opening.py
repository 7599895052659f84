"""Checkpoints and configurations that do not belong together, or that no model can be opened from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import PruneConfig, load, prune
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.configuration import load_config
from tests.conftest import FAMILIES, Listener, change_json, make_model
from tests.helpers.failing_runs import expect_failure


def test_shapes_that_do_not_fit_the_configuration(tmp_path: Path, llama: Path, tokens: Path) -> None:
    change_json(llama / "config.json", intermediate_size=48)
    expect_failure("its config.json says", ModelError, tmp_path, model=str(llama), calibration=str(tokens))


def test_checkpoints_that_do_not_fit_their_configuration(tmp_path: Path, llama: Path, tokens: Path) -> None:
    good = {"model": str(llama), "calibration": str(tokens)}
    whole = load_file(llama / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    for tensors, message in (
        ({key: tensor for key, tensor in whole.items() if key != name}, f"has no tensor '{name}'"),
        (whole | {name: torch.ones(7)}, f"{name} of .* has shape \\(7,\\), its config.json says \\(32,\\)"),
        (whole | {name: torch.ones(32, dtype=torch.int8)}, f"{name} is I8; F64"),
    ):
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        expect_failure(message, ModelError, tmp_path, **good)
    save_file(whole, llama / "model.safetensors", {"format": "pt"})
    change_json(llama / "config.json", num_hidden_layers=1)
    expect_failure("has decoder layer 1, config.json says that there are 1", ModelError, tmp_path, **good)
    change_json(llama / "config.json", num_hidden_layers=0)
    expect_failure("does not describe a model", ModelError, tmp_path, **good)
    change_json(llama / "config.json", num_hidden_layers=2, hidden_act="zzz")
    expect_failure("does not describe a model: .*zzz", ModelError, tmp_path, **good)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters: "),
        (
            "gemma3",
            {"text_config": {**FAMILIES["gemma3"]["text_config"], "rms_norm_eps": float("-inf")}},
            "text_config.rms",
        ),
        ("bamba", {"time_step_limit": [0.0, float("inf")]}, None),  # its default
    ],
)
def test_numbers_of_a_configuration_are_finite(
    tmp_path: Path, tokens: Path, family: str, changes: dict[str, Any], says: str | None
) -> None:
    model = make_model(tmp_path / "model", family)
    change_json(model / "config.json", **changes)
    if says is None:
        load_config(CheckpointSource(model))
    else:
        good = {"model": str(model), "calibration": str(tokens)}
        expect_failure(f"config.json of .* says {re.escape(says)}", ModelError, tmp_path, **good)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float8_e4m3fn"])
def test_a_dtype_that_nothing_is_computed_in(tmp_path: Path, llama: Path, tokens: Path, dtype: str) -> None:
    change_json(llama / "config.json", dtype=dtype)
    expect_failure("says dtype torch", ModelError, tmp_path, model=str(llama), calibration=str(tokens))
    with pytest.raises(ModelError, match="says dtype torch"):
        load(llama)


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_stored_buffer_of_another_shape(tmp_path: Path, tokens: Path, shape: tuple[int, ...]) -> None:
    model = make_model(tmp_path / "model", "deepseek_v3")
    tensors = load_file(model / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    save_file(tensors | {name: torch.zeros(shape)}, model / "model.safetensors", {"format": "pt"})
    expect_failure(f"{name} of .* has shape", ModelError, tmp_path, model=str(model), calibration=str(tokens))
    with pytest.raises(ModelError, match=f"{name} has shape"):
        load(model)
    save_file({key: tensors[key] for key in tensors if key != name}, model / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=f"has no {name}: an untrained model's values are taken"):
        load(model)
    listener = Listener()
    prune(PruneConfig(model=str(model), output=tmp_path / "out", calibration=str(tokens)), listener)
    assert [warning for warning in listener.warnings if "has no" in warning] == [
        f"{model} has no {name}: an untrained model's values are taken"
    ]


@pytest.mark.parametrize("change", ["more", "fewer", "one column", "biases of one column"])
def test_stacked_experts_that_do_not_fit_the_configuration(tmp_path: Path, tokens: Path, change: str) -> None:
    model = make_model(tmp_path / "model", "gpt_oss")
    tensors = load_file(model / "model.safetensors")
    down, bias = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj_bias"
    tensors |= {
        "more": {down: torch.cat([tensors[down]] * 2)},
        "fewer": {down: tensors[down][:3].clone()},
        "one column": {down: tensors[down][:, :1].clone()},
        "biases of one column": {bias: tensors[bias][:, :1].clone()},
    }[change]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    expect_failure("has shape", ModelError, tmp_path, model=str(model), calibration=str(tokens))
    with pytest.raises(ModelError, match="has shape"):
        load(model)


@pytest.mark.parametrize("chosen", [100, -1])
def test_a_token_has_no_more_experts_than_there_are(tmp_path: Path, tokens: Path, chosen: int) -> None:
    model = make_model(tmp_path / "model", "qwen3_moe")
    change_json(model / "config.json", num_experts_per_tok=chosen)
    message = f"does not describe a model: it chooses {chosen} experts for a token, of 4"
    expect_failure(message, ModelError, tmp_path, model=str(model), calibration=str(tokens))


def test_a_tensor_of_experts_that_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gpt_oss")
    name = "model.layers.0.mlp.experts.gate_up_proj_scale_inv"
    tensors = load_file(model / "model.safetensors") | {name: torch.ones(4)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=f"has no place for {name}"):
        load(model)


def test_positions_that_are_not_numbers(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """An absurd frequency makes NaN, which equals no NaN, and is not what depends on the tokens."""
    change_json(llama / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 0})
    expect_failure("NaN or Inf", ModelError, tmp_path, model=str(llama), calibration=str(tokens))


def test_more_layers_than_tensors(tmp_path: Path, llama: Path, tokens: Path) -> None:
    change_json(llama / "config.json", num_hidden_layers=10**9)
    good = {"model": str(llama), "calibration": str(tokens)}
    expect_failure("says num_hidden_layers: 1,000,000,000, but its weights are", ModelError, tmp_path, **good)
