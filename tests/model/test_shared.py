"""A linear that two modules of a layer share is pruned once, from the inputs of both, and written twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from llm_barber import InspectConfig, PruneConfig, inspect, load, prune
from llm_barber.errors import ModelError
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured
from tests.conftest import make_model, read_folder, save_tokens
from tests.model.reference import prune_in_memory

NAMES = [f"model.layers.{index}.self_attn" for index in range(2)]
BLOCKS = {
    "attention": ("self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp": ("mlp", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}


@pytest.fixture(params=["one module", "tied"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Queries and outputs are projected by the same weight."""
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name in NAMES:
        tensors[f"{name}.o_proj.weight"] = tensors[f"{name}.q_proj.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if request.param == "tied":
        tied = {f"{name}.o_proj.weight": f"{name}.q_proj.weight" for name in NAMES}
        keys = {"lm_head.weight": "model.embed_tokens.weight", **tied}
        monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "_tied_weights_keys", keys)
        return folder
    make = modeling_llama.LlamaAttention.__init__

    def share(attention: nn.Module, *arguments: Any, **keywords: Any) -> None:
        make(attention, *arguments, **keywords)
        attention.o_proj = attention.q_proj

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", share)
    return folder


def test_equals_the_method_in_memory(tmp_path: Path, model: Path) -> None:
    """Autograd sums the gradients of both calls; Wanda's mask has inputs of both."""
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    report = prune(
        PruneConfig(
            model=model, output=tmp_path / "out", granularity="output", rebuild_ratio=0.5, calibration=tokens,
            dtype="float32", batch_size=2, report=False,
        )
    )  # fmt: skip
    assert [linear.name for block in report.layers[0].blocks for linear in block.linears] == [
        name for _, linears in BLOCKS.values() for name in linears
    ]
    assert report.swapped > 0
    expected = prune_in_memory(
        model,
        "model.layers",
        lambda _: BLOCKS,
        load_file(tokens)["input_ids"],
        Unstructured(0.5),
        Granularity.OUTPUT,
        0.5,
    )
    written = read_folder(tmp_path / "out")
    for name, keep in expected.items():
        assert torch.equal(written[f"{name}.weight"] != 0, keep), name
    for name in NAMES:
        assert torch.equal(written[f"{name}.q_proj.weight"], written[f"{name}.o_proj.weight"])
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.zeros(1, 3, dtype=torch.int64))
        .logits.isfinite()
        .all()
    )


@pytest.mark.parametrize(
    "settings", [{"preset": "best"}, {"initial": "sparsegpt"}, {"preset": "mask", "pattern": "2:4"}]
)
def test_every_method_prunes_it_once(tmp_path: Path, model: Path, settings: dict[str, str]) -> None:
    common: dict[str, Any] = {"dtype": "float32", "report": False}
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8)
    report = prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **common, **settings))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    written = read_folder(tmp_path / "out")
    for name in NAMES:
        assert (written[f"{name}.q_proj.weight"] == 0).float().mean() > 0.3
        assert torch.equal(written[f"{name}.q_proj.weight"], written[f"{name}.o_proj.weight"])


def test_inspected_and_loaded_packed(tmp_path: Path, model: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"model": model, "calibration": tokens, "dtype": "float32", "report": False}
    settings |= {"initial": "wanda", "sparsity": 0.7}
    prune(PruneConfig(output=tmp_path / "out", **settings))
    prune(PruneConfig(output=tmp_path / "packed", format="packed", **settings))
    for output in (tmp_path / "out", tmp_path / "packed"):
        assert not inspect(InspectConfig(model=output, dense=str(model))).problems
    texts = load_file(tokens)["input_ids"]
    plain = load(tmp_path / "out")(texts).logits
    torch.testing.assert_close(load(tmp_path / "packed", keep_packed=True)(texts).logits, plain)


def test_two_values_of_one_weight_are_refused(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{NAMES[1]}.o_proj.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(ModelError, match="o_proj.weight differ, and are one weight"):
        prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens))


@pytest.mark.parametrize("settings", [{"preset": "best"}, {"preset": "mask", "refine": "swaps"}, {"initial": "wanda"}])
def test_shared_by_two_blocks(tmp_path: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=2, intermediate_size=32)
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        name = f"model.layers.{index}"
        tensors[f"{name}.mlp.down_proj.weight"] = tensors[f"{name}.self_attn.o_proj.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    make = modeling_llama.LlamaDecoderLayer.__init__

    def share(layer: nn.Module, *arguments: Any, **keywords: Any) -> None:
        make(layer, *arguments, **keywords)
        layer.mlp.down_proj = layer.self_attn.o_proj

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", share)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8)
    common: dict[str, Any] = {"dtype": "float32", "report": False}
    report = prune(PruneConfig(model=folder, output=tmp_path / "out", calibration=tokens, **common, **settings))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    written = read_folder(tmp_path / "out")
    for index in range(2):
        name = f"model.layers.{index}"
        assert torch.equal(written[f"{name}.mlp.down_proj.weight"], written[f"{name}.self_attn.o_proj.weight"])


def test_a_checkpoint_that_has_it_once(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "o_proj" not in name},
        model / "model.safetensors",
        {"format": "pt"},
    )
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"dtype": "float32", "preset": "mask", "report": False}
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings))
    written = read_folder(tmp_path / "out")
    assert not any("o_proj" in name for name in written)
    assert all((written[f"{name}.q_proj.weight"] == 0).float().mean() > 0.3 for name in NAMES)


def test_layers_that_share_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=2)
    make = modeling_llama.LlamaModel.__init__

    def share(whole: nn.Module, *arguments: Any, **keywords: Any) -> None:
        make(whole, *arguments, **keywords)
        whole.layers[1].mlp = whole.layers[0].mlp

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", share)
    with pytest.raises(
        ModelError, match="model.layers.1.mlp.gate_proj.weight and model.layers.0.mlp.gate_proj.weight are one weight"
    ):
        prune(PruneConfig(model=folder, output=tmp_path / "out", calibration=save_tokens(tmp_path / "t.safetensors")))
    assert not (tmp_path / "out").exists()
