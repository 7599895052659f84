"""Pruned weights stay zero while a model is trained: after every step, in the weights that the forward pass uses."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from llm_barber import PackConfig, hold_zeros, load, pack
from llm_barber.errors import ModelError, SettingsError
from llm_barber.runtime.held_zeros import is_held
from tests.conftest import load_model, make_model
from tests.helpers.trained import language_loss, make_pruned, used_weights, zeros_of

Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01, weight_decay=0.1),
    "adafactor-of-transformers": partial(
        transformers.Adafactor, lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1
    ),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
}


class Noise(torch.optim.Optimizer):
    """Adds noise to all weights, as an optimiser may that does not go by gradients alone."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny LLaMA with a record; half of each linear is zero."""
    return make_pruned(tmp_path_factory.mktemp("held"))


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[dict[str, Tensor]]:
    """Train with two accumulated gradients a step and clipping; the weights that the pass after each step used."""
    history = []
    with used_weights(linears_of(model)) as used:
        for step in range(steps):
            for part in range(2):
                language_loss(model, 2 * step + part).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            language_loss(model)
            history.append(dict(used))
    return history


def assert_zeros_hold(history: list[dict[str, Tensor]], zeros: dict[str, Tensor]) -> None:
    """Zeros are +0.0 in every pass, and the other weights are trained."""
    for used in history:
        assert used.keys() == zeros.keys()
        for name, weight in used.items():
            assert torch.equal(weight == 0, zeros[name]), name
            assert not torch.signbit(weight[zeros[name]]).any(), name
    assert all(not torch.equal(history[0][name], history[-1][name]) for name in zeros)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["adamw"], Noise, getattr(torch.optim, "Muon", Noise)])
def test_zeros_hold_after_every_step(pruned: Path, optimizer: Optimizers) -> None:
    """Also where steps do not go by the gradient alone."""
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = hold_zeros(model)
    zeros = zeros_of(model, held.names)
    assert zeros.keys() == linears_of(model).keys()
    assert held.zeros * 2 == held.weights == sum(mask.numel() for mask in zeros.values())
    assert_zeros_hold(train(model, optimizer([model.get_parameter(name) for name in held.names])), zeros)


class Masked(nn.Module):
    """Multiplies a weight with a mask: the textbook's way, and the oracle."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_a_masked_parametrisation_does(name: str) -> None:
    """Momentum and factored moments see the gradient of the sparse model, and so does clipping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.masked_fill_(torch.rand_like(linear.weight) < 0.4, 0)
    oracle = copy.deepcopy(model)
    for linear in (oracle[0], oracle[2]):
        parametrize.register_parametrization(linear, "weight", Masked((linear.weight != 0).float()))
    held = hold_zeros(model)
    assert held.names == ("0.weight", "2.weight")
    inputs = torch.randn(5, 6)
    optimizers = [OPTIMIZERS[name](candidate.parameters()) for candidate in (model, oracle)]
    for _ in range(5):
        for candidate, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            candidate(inputs).square().sum().backward()
            nn.utils.clip_grad_norm_(candidate.parameters(), 0.1)
            optimizer.step()
        for index in (0, 2):
            assert torch.equal(model[index].weight == 0, oracle[index].weight == 0)
            for tensor, expected in (
                (model[index].weight, oracle[index].weight),
                (model[index].bias, oracle[index].bias),
            ):
                # Means of rows and columns, which Adafactor takes, are rounded differently on some processors.
                tolerance = 1e-6 if name == "adafactor" else 0
                torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance / 10)


def test_infinite_gradients_of_pruned_weights_do_not_count() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 4.0]]))
    hold_zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    (model.weight * torch.tensor([[1.0, torch.inf, 1.0], [torch.nan, 1.0, 1.0]])).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[1, 0, 1], [0, 1, 1]]
    optimizer.step()
    assert torch.equal(model.weight == 0, torch.tensor([[False, True, False], [True, False, False]]))


def test_zeros_hold_in_mixed_precision(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = hold_zeros(model)
    zeros = zeros_of(model, held.names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1)  # overflows: some steps are skipped
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_loss(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(model.get_parameter(name) == 0, zeros[name]) for name in held.names)
    assert optimizer.state
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    hold_zeros(model)
    assert_zeros_hold(train(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)), zeros)


def test_zeros_hold_in_a_compiled_model(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    compiled = torch.compile(model, backend="aot_eager")
    held = hold_zeros(compiled)
    assert hold_zeros(model) is held
    zeros = zeros_of(model, held.names)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
    for step in range(3):
        language_loss(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(model.get_parameter(name) == 0, zeros[name]) for name in held.names)


def test_parameters_that_are_replaced_are_held(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = hold_zeros(model)
    zeros = zeros_of(model, held.names)
    for linear in linears_of(model).values():
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    assert_zeros_hold(train(model, OPTIMIZERS["sgd"](model.parameters())), zeros)


def test_weights_that_are_unfrozen_later_are_held(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    held = hold_zeros(model)
    assert not held._masks  # frozen weights cost no memory
    zeros = zeros_of(model, held.names)
    model.requires_grad_(True)
    assert_zeros_hold(train(model, OPTIMIZERS["sgd"](model.parameters())), zeros)


def test_a_second_call_gives_the_same_and_remove_ends_it(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = hold_zeros(model)
    assert hold_zeros(model) is held
    assert is_held(model)
    assert repr(held) == f"HeldZeros({held.zeros:,} of {held.weights:,} weights in 14 parameters)"
    held.remove()
    held.remove()
    assert not is_held(model)
    zeros = zeros_of(model, held.names)
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    assert not any(torch.equal(model.get_parameter(name) == 0, zeros[name]) for name in held.names)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with hold_zeros(model):
        assert is_held(model)
    assert not is_held(model)


def test_a_model_that_nothing_uses_is_freed_and_its_copy_is_not_held(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = weakref.ref(hold_zeros(model))
    assert not is_held(copy.deepcopy(model))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert held() is None


def test_apply_is_for_steps_of_other_programs(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    held = hold_zeros(model)
    zeros = zeros_of(model, held.names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    held.apply()
    assert all((model.get_parameter(name)[zeros[name]] == 0).all() for name in held.names)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_oss", "gemma3", "mixtral"])
def test_linears_are_those_of_the_record(tmp_path: Path, family: str) -> None:
    """Also (in, out), stacks of experts, and language models inside of others."""
    folder = make_pruned(tmp_path, family)
    model = load_model(folder)
    held = hold_zeros(model)
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)}
    assert set(held.names) == {
        name for name, matrix in matrices.items() if (matrix == 0).float().mean() > 0.2 and not name.endswith("bias")
    }
    assert held.zeros == sum(int((model.get_parameter(name) == 0).sum()) for name in held.names)
    zeros = zeros_of(model, held.names)
    optimizer = Noise(model.parameters())
    language_loss(model).backward()
    optimizer.step()
    for name in held.names:
        assert torch.equal(model.get_parameter(name) == 0, zeros[name]), name


def test_a_pruned_head_is_held(tmp_path: Path) -> None:
    folder = make_pruned(tmp_path, settings={"prune_head": True})
    model = load_model(folder)
    assert "lm_head.weight" in hold_zeros(model).names


def test_without_a_record_matrices_with_zeros_are_held(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    expected = hold_zeros(model).names
    model = AutoModelForCausalLM.from_pretrained(pruned)
    model.config._name_or_path = ""
    model.new_head = nn.Linear(32, 2)  # begins at zero, and has to be trained
    with torch.no_grad():
        model.new_head.weight.zero_()
        model.get_input_embeddings().weight[5] = 0
        model.get_input_embeddings().weight[:, :8] = 0
    assert set(hold_zeros(model).names) == set(expected)
    other = AutoModelForCausalLM.from_pretrained(pruned)
    other.config._name_or_path = ""
    with pytest.raises(ModelError, match="no matrix of the model has 60% zeros"):
        hold_zeros(other, share=0.6)
    assert set(hold_zeros(other, pruned).names) == set(expected)  # by the record of this folder


def test_few_zeros_are_found_by_the_record(tmp_path: Path) -> None:
    model = load_model(make_pruned(tmp_path, settings={"sparsity": 0.05}))
    assert set(hold_zeros(model).names) == set(linears_of(model))


def test_zeros_that_training_has_filled_are_noticed(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(ModelError, match=r"the model has [\d,]+ zeros, and the run of .* pruned"):
        hold_zeros(model)


def test_models_that_cannot_be_held(pruned: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "dense", "llama"))
    with pytest.raises(ModelError, match="no matrix of the model has 10% zeros") as caught:
        hold_zeros(dense)
    assert "load the pruned checkpoint, not the dense one" in caught.value.hint
    with pytest.raises(ModelError, match=r"has no barber\.json"):
        hold_zeros(dense, tmp_path / "dense")
    with pytest.raises(SettingsError, match="share is 0: it must be above 0 and at most 1"):
        hold_zeros(dense, share=0)
    pack(PackConfig(model=str(pruned), output=tmp_path / "packed"))
    with pytest.raises(SettingsError, match="packed in memory") as settings_error:
        hold_zeros(load(tmp_path / "packed", keep_packed=True))
    assert "dequantize" in settings_error.value.hint
    assert len(hold_zeros(load(tmp_path / "packed")).names) == 14
    with pytest.raises(SettingsError, match="weight is on the meta device"):
        hold_zeros(nn.Linear(4, 4, device="meta"))


def test_flattened_parameters_are_refused() -> None:
    """Those of FSDP version 1, which are views of one vector."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[:2] = 0
    hold_zeros(model)
    model.weight = nn.Parameter(model.weight.detach().flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.sum().backward()
    with pytest.raises(SettingsError, match="flattened") as caught:
        optimizer.step()
    assert "fully_shard" in caught.value.hint
