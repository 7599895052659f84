"""A layer of experts: gradients equal autograd's, and linears that read one tensor share a statistic."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber.masking.gradient_squares import GradientSquares
from llm_barber.masking.statistics import InputSquares
from llm_barber.method import clipped_gradients
from llm_barber.method.clipped_gradients import clipped_gradients_by_weights
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import block_gradients, output_gradients
from llm_barber.parallel.ranks import Ranks
from tests.helpers.experts import EXPERTS, HIDDEN, split

SEQUENCES, TOKENS = 5, 24


class Mixture(nn.Module):
    """A router and experts; two for each token."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        with torch.no_grad():
            self.router.weight[-1] = 0  # the last one has few tokens
        self.experts = split(family, torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden.flatten(0, 1)
        weights, index = self.router(states).softmax(-1).topk(2)
        return self.experts(states, index, weights).view_as(hidden)


class Layer(nn.Module):
    """A linear, then a mixture."""

    def __init__(self, family: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mlp = nn.Linear(HIDDEN, HIDDEN), Mixture(family)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden)
        return hidden + self.mlp(hidden)


def decoder_layer(family: str) -> tuple[DecoderLayer, Block]:
    module = Layer(family)
    linears = tuple(
        name for name, child in module.named_modules() if isinstance(child, nn.Linear) and "router" not in name
    )
    block = Block("mlp", "mlp", tuple(name for name in linears if name.startswith("mlp")))
    return DecoderLayer(module, linears, lambda *_: {}), block


def states(seed: int = 0) -> Tensor:
    return torch.randn(SEQUENCES, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def streams(hidden: Tensor) -> Any:
    """A stand-in for the streams: two batches of sequences."""
    return SimpleNamespace(
        batches=lambda: (slice(0, 2), slice(2, SEQUENCES)), read=lambda _, batch: hidden[batch], ranks=Ranks()
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_gradients_by_weights_equal_autograd(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipped_gradients, "HUGE_TERM", math.inf)
    layer, _ = decoder_layer(family)
    weights = {name: linear.weight.clone().requires_grad_() for name, linear in layer.linears.items()}
    loss = layer.output_with(weights, states()[:1]).square().sum()
    by_autograd = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    expected = {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), by_autograd, strict=True)
    }
    detached = {name: weight.detach() for name, weight in weights.items()}
    parts, scale = output_gradients(layer, detached, states()[:1], lambda output: 2 * output)
    gradients = clipped_gradients_by_weights(parts)
    assert set(gradients) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient * scale, expected[name], rtol=1e-4, atol=1e-5 * largest)


def test_gate_and_up_share_a_statistic_and_a_group() -> None:
    layer, block = decoder_layer("qwen3_moe")
    collected = collect_inputs(layer, streams(states()), InputSquares)
    statistics = {id(statistic) for statistic in collected.values()}
    assert len(statistics) == 1 + 2 * EXPERTS
    for number in range(EXPERTS):
        gate, up, down = (collected[f"mlp.experts.{number}.{name}_proj"] for name in ("gate", "up", "down"))
        assert gate is up is not down
    groups = layer.input_groups(block, states())
    pairs = {tuple(f"mlp.experts.{number}.{name}_proj" for name in ("gate", "up")) for number in range(EXPERTS)}
    assert set(groups) == pairs | {(f"mlp.experts.{number}.down_proj",) for number in range(EXPERTS)}
    assert len(groups) == 2 * EXPERTS


def test_several_calls_of_experts_count_as_more_tokens() -> None:
    """A layer that calls its experts on each half of the features' sum: gradients add up before they are squared."""
    layer, block = decoder_layer("nemotron_h")
    mixture: Any = layer.module.mlp
    once = mixture.forward
    mixture.forward = lambda hidden: once(hidden) + once(-hidden)
    hidden = states()[:2]
    squares = {name: GradientSquares(tuple(layer.linears[name].weight.shape), hidden.device) for name in block.linears}
    target = states(1)[:2]
    block_gradients(layer, block, hidden, target, {}, squares)
    weights = {name: layer.linears[name].weight.clone().requires_grad_() for name in block.linears}
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for sequence in range(2):
        for experts in layer.experts.values():
            experts.sequences = 1
        parameters = {f"{name.removeprefix('mlp.')}.weight": weight for name, weight in weights.items()}
        states_of = hidden[sequence : sequence + 1] + layer.module.first(hidden[sequence : sequence + 1])
        output = torch.func.functional_call(mixture, parameters, (states_of,))
        loss = (output - target[sequence : sequence + 1]).square().mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                expected[name] += gradient.square() / 2
    assert max(float(of.max()) for of in expected.values()) > 0
    for name, statistic in squares.items():
        torch.testing.assert_close(statistic.mean, expected[name], rtol=1e-3, atol=1e-9)
