"""LoRA of pruned linears: training sees the masked product, and it is what is merged."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber import InspectConfig, hold_zeros, inspect, merge_adapter
from llm_barber.errors import ModelError, OutputError, SettingsError
from llm_barber.runtime.held_zeros import is_held
from tests.conftest import load_model
from tests.helpers.trained import IDS, language_loss, make_pruned, zeros_of

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pruned(tmp_path_factory.mktemp("lora"))


def adapted(folder: Path, **settings: Any) -> nn.Module:
    """A pruned model with a random LoRA, which PEFT begins at zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        load_model(folder), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings})
    )
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def explicit(layer: nn.Module, inputs: Tensor, adapter: str = "default") -> Tensor:
    """The masked product, written out: x·(W + M∘(s·B·A))ᵀ + b."""
    base = layer.get_base_layer()
    product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
    weight = base.weight.t() if layer.fan_in_fan_out else base.weight
    return nn.functional.linear(inputs, weight + product * (weight != 0), base.bias)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forward_and_gradients_are_those_of_the_masked_product(tmp_path: Path, family: str) -> None:
    """Also of weights that are stored as (in, out), and with a bias."""
    targets = TARGETS if family == "llama" else ["c_attn", "c_proj", "c_fc"]
    model = adapted(make_pruned(tmp_path, family), target_modules=targets, fan_in_fan_out=family == "gpt2")
    hold_zeros(model)
    layers = lora_layers(model)
    assert layers
    for layer in layers.values():
        inputs = torch.randn(2, 5, layer.in_features, requires_grad=True)
        trained = [inputs, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        output, expected = layer(inputs), explicit(layer, inputs)
        assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(output.square().sum(), trained)
        expected_gradients = torch.autograd.grad(expected.square().sum(), trained)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-3)
        plain = inputs @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).t() * 1.5
        assert not torch.allclose(output, layer.get_base_layer()(inputs) + plain, atol=1e-2)


@pytest.mark.parametrize("safe", [True, False])
def test_what_was_trained_is_merged(pruned: Path, safe: bool) -> None:
    model = adapted(pruned)
    before = load_model(pruned)
    held = hold_zeros(model)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01, weight_decay=0.1
    )
    for step in range(3):
        language_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = model(IDS).logits
    merged = merge_adapter(model) if safe else model.merge_and_unload()  # PEFT's own keeps the zeros, too
    assert torch.allclose(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, before(IDS).logits, atol=1e-2)
    names = [name.removeprefix("base_model.model.").replace("base_layer.", "") for name in held.names]
    zeros, now = zeros_of(before, names), zeros_of(merged, names)
    assert all(torch.equal(zeros[name], now[name]) for name in names)
    assert type(merged) is type(before)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in before.named_parameters()}


def test_remove_gives_peft_its_products_back(pruned: Path) -> None:
    model = adapted(pruned).eval()
    plain = model(IDS).logits
    held = hold_zeros(model)
    masked = model(IDS).logits
    assert not torch.allclose(masked, plain, atol=1e-2)
    held.remove()
    assert torch.equal(model(IDS).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, load_model(pruned)(IDS).logits)


def test_adapters_that_are_added_later_are_masked_at_the_next_call(pruned: Path) -> None:
    model = adapted(pruned)
    held = hold_zeros(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    randomise(model)
    assert hold_zeros(model) is held
    model.set_adapter("second")
    layer = next(iter(lora_layers(model).values()))
    inputs = torch.randn(3, layer.in_features)
    assert torch.allclose(layer(inputs), explicit(layer, inputs, "second"), rtol=1e-5, atol=1e-5)


def test_dropout_and_biases_of_lora(pruned: Path, tmp_path: Path) -> None:
    model = adapted(pruned, lora_dropout=0.5)
    hold_zeros(model)
    layer = next(iter(lora_layers(model).values()))
    inputs = torch.ones(4, layer.in_features)
    model.train()
    assert not torch.equal(layer(inputs), layer(inputs))
    model.eval()
    assert torch.allclose(layer(inputs), explicit(layer, inputs), rtol=1e-5, atol=1e-5)
    model = adapted(make_pruned(tmp_path, "qwen2"), target_modules=["q_proj"], lora_bias=True).eval()
    hold_zeros(model)
    expected = model(IDS).logits
    assert torch.allclose(merge_adapter(model)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_other_trained_modules_of_peft_are_held(tmp_path: Path) -> None:
    model = adapted(make_pruned(tmp_path, settings={"prune_head": True}), modules_to_save=["lm_head"])
    held = hold_zeros(model)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    zeros = zeros_of(model, [name])
    assert zeros[name].float().mean() > 0.4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    language_loss(model).backward()
    optimizer.step()
    assert name in held.names
    assert torch.equal(model.get_parameter(name) == 0, zeros[name])


def test_a_merged_checkpoint_continues_the_record(pruned: Path, tmp_path: Path) -> None:
    model = adapted(pruned).eval()
    hold_zeros(model)
    expected = model(IDS).logits
    merge_adapter(model, tmp_path / "merged")
    assert torch.allclose(load_model(tmp_path / "merged")(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    result = inspect(InspectConfig(model=str(tmp_path / "merged"), dense=str(pruned.parent / "dense")))
    assert result.problems == ()
    assert result.fine_tuned == 6
    assert result.sparsity == 0.5
    with pytest.raises(OutputError, match="exists"):
        merge_adapter(adapted(pruned), tmp_path / "merged")


def test_adapters_that_would_fill_zeros_are_refused(pruned: Path) -> None:
    dora = adapted(pruned, use_dora=True)
    with pytest.raises(SettingsError, match="would fill its zeros.*DoraLinearVariant") as caught:
        hold_zeros(dora)
    assert not is_held(dora)
    assert "plain LoRA" in caught.value.hint
    other = peft.get_peft_model(load_model(pruned), peft.LoHaConfig(r=2, target_modules=TARGETS))
    with pytest.raises(SettingsError, match=r"would fill its zeros.*loha"):
        merge_adapter(other)
    ia3 = peft.get_peft_model(
        load_model(pruned), peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])
    )
    assert merge_adapter(ia3) is not None


def test_models_without_an_adapter_are_refused(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="has no adapter to merge"):
        merge_adapter(load_model(pruned))
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(SettingsError, match="has no adapter to merge") as caught:
        merge_adapter(load_model(pruned))
    assert "pip install peft" in caught.value.hint


def test_broken_adapters_are_not_merged(pruned: Path) -> None:
    model = adapted(pruned)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="cannot be merged: NaNs detected"):
        merge_adapter(model)
