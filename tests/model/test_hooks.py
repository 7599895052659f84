"""Hooks on a layer: what a replay returns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber.model.architecture import Block
from llm_barber.model.hooks import LayerHooks, Reached


class Attention(nn.Module):
    """Returns states, weights of attention, and a bias that the layer adds, as GPT-NeoX Japanese does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(4.0))
        self.calls = 0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        return hidden * 2, torch.ones(len(hidden), 2, 3, 3), self.bias


class Layer(nn.Module):
    """Adds the attention's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.weights: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        states, self.weights, bias = self.attention(hidden)
        return states + bias


def test_a_replay_gives_what_follows_the_states_but_attention_weights() -> None:
    layer, hidden = Layer(), torch.randn(2, 3, 4)
    expected = layer(hidden)
    hooks, outputs = LayerHooks(layer, ()), list[Tensor]()
    block = Block("attention", "attention", ())
    with pytest.raises(Reached), hooks.stop_at(block, outputs, len(hidden)):
        layer(hidden)
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 4)]
    assert layer.attention.calls == 2
    with hooks.replayed({"attention": outputs[0]}):
        assert torch.equal(layer(hidden), expected)
    assert layer.attention.calls == 2
    assert layer.weights is None
