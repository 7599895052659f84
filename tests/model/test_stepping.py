"""Models whose decoder layers can be stepped over, and models that are refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError
from llm_barber.model.stepping import Stepping, capture, different_tensors, find_stepping

CPU = torch.device("cpu")


class Layer(nn.Module):
    """A layer that may be passed things."""

    def forward(self, hidden_states: Tensor, scale: Any = None, before: Any = None) -> Any:
        return hidden_states


class Model(nn.Module):
    """An embedding and three layers, run by a function of both."""

    def __init__(self, run: Callable[["Model", Tensor], Tensor], layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.run = run

    @property
    def base_model(self) -> "Model":
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.run(self, input_ids))


def alone(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden = layer(hidden, scale=torch.ones(2))
    return hidden


def first_of(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden = layer(hidden_states=hidden)[0]
    return hidden


def two(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden, _ = layer(hidden)
    return hidden


def looked_into(model: Model, tokens: Tensor) -> Tensor:
    """Add up the losses that layers return beside the states, where there are any."""
    hidden, total = model.embedding(tokens), 0.0
    for layer in model.layers:
        hidden, loss = layer(hidden)
        total = total if loss is None else total + loss.sum()
    return hidden


def handed_on(model: Model, tokens: Tensor) -> Tensor:
    hidden, state = model.embedding(tokens), None
    for layer in model.layers:
        hidden, state = layer(hidden, None, state)
    return hidden


def twice(model: Model, tokens: Tensor) -> Tensor:
    return alone(model, tokens) + alone(model, tokens)


def backwards(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in reversed(model.layers):
        hidden = layer(hidden)
    return hidden


def of_tokens(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden = layer(hidden, scale={"nested": [model.embedding(tokens) * 2]})
    return hidden


def shorter(model: Model, tokens: Tensor) -> Tensor:
    hidden = model.embedding(tokens)
    for layer in model.layers:
        hidden = layer(hidden[:, :-1])
    return hidden


@pytest.mark.parametrize(("run", "tail"), [(alone, None), (first_of, 1), (two, 1), (looked_into, 1)])
def test_what_layers_have_to_return_is_found(run: Callable[..., Tensor], tail: int | None) -> None:
    model = Model(run)
    result = find_stepping(model, model.layers, CPU)  # type: ignore[arg-type]
    assert result == Stepping(tail, {})
    tokens = torch.tensor([[3, 1, 2]] * 3)  # as many sequences as layers: a tensor of them could be unpacked
    states, arguments = capture(model, model.layers, tokens, result.tail)  # type: ignore[arg-type]
    assert torch.equal(states, model.embedding(tokens))
    assert len(arguments) == 3
    if run is alone:
        assert torch.equal(arguments[2]["scale"], torch.ones(2))
    assert "forward" not in vars(model.layers[0])


def test_what_layers_hand_on_has_to_be_nothing() -> None:
    model = Model(handed_on)
    result = find_stepping(model, model.layers, CPU)  # type: ignore[arg-type]
    assert result == Stepping(1, {0: "before"})
    result.check(model, (torch.ones(1), None))
    with pytest.raises(ModelError, match="'before', which the layer before has made"):
        result.check(model, (torch.ones(1), torch.ones(1)))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (twice, "decoder layer 0 more than once"),
        (backwards, "decoder layer 2 before layer 0"),
        (of_tokens, "'scale', which depends on the tokens"),
        (shorter, "cannot be run with its layers stepped over: layer 1 is given other states than layer 0"),
    ],
)
def test_layers_that_cannot_be_computed_by_themselves_are_refused(run: Callable[..., Tensor], message: str) -> None:
    model = Model(run)
    with pytest.raises(ModelError, match=message):
        find_stepping(model, model.layers, CPU)  # type: ignore[arg-type]


def test_arguments_differ_where_a_tensor_in_them_does() -> None:
    arguments = {"mask": None, "positions": (torch.ones(2), [torch.zeros(2)]), "scale": torch.ones(1)}
    changed = {**arguments, "positions": (torch.ones(2), [torch.ones(2)])}
    assert different_tensors(arguments, arguments) == []
    assert different_tensors(arguments, changed) == ["positions"]
