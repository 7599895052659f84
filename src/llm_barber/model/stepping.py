"""Run a model around its decoder layers: they are stepped over, and what the model passes to each of them is noted.

A layer can be computed by itself if what the model passes to it (mask, positions) depends neither on the tokens nor on
what the layers before it compute, but for the states; `find_stepping` makes sure of that.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber.errors import ModelError

Arguments = dict[str, Any]
TOKENS = 8  # of the sequence that is tried
# How many things layers may return after the states; None: they return the states alone.
TAILS: tuple[int | None, ...] = (None, 1, 0, 2, 3, 4, 5, 6, 7)
HINT = "such models cannot be pruned yet: open an issue that names it"


class _LayersReached(Exception):  # noqa: N818 - a signal, not an error
    """The last decoder layer was called: what comes after it is not needed."""


@dataclass(frozen=True)
class _Beside:
    """Stands for what a layer returns beside the states; which of it."""

    place: int


@dataclass(frozen=True)
class Stepping:
    """What a layer that does nothing has to return.

    `tail`: how many things after the states, for the model to go on; None: no tuple. `handed_on`: which of them the
    model passes to the next layer, and the argument's name; they have to be None where layers do something.
    """

    tail: int | None
    handed_on: dict[int, str]

    def check(self, model: nn.Module, output: Any) -> None:
        """Refuse layers that hand on more than the states.

        Raises:
            ModelError: `output`, of a layer, does so.
        """
        for place, name in self.handed_on.items():
            if output[1 + place] is not None:
                raise ModelError(
                    f"{type(model).__name__} passes its layers {name!r}, which the layer before has made", HINT
                )


def find_stepping(model: PreTrainedModel, layers: nn.ModuleList, device: torch.device) -> Stepping:
    """What each layer has to return.

    Models take what a layer returns as it is, or its first, or unpack as many things as there are: what does for this
    one is found by trying.

    Args:
        model: with weights, of any value, outside its layers.
        layers: its decoder layers.
        device: of the model.

    Raises:
        ModelError: nothing does; or a layer is called again or out of order, or is passed what depends on the tokens.
    """
    # Falling, so that no embedding of positions is taken for one of tokens.
    tokens = (torch.arange(TOKENS, 0, -1) % model.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    failed: Exception | None = None
    for tail in TAILS:
        for marked in (True, False):  # some models look into it
            calls = _Calls(model, layers)
            try:
                with (
                    calls.noted(),
                    _of_tokens(model, tokens),
                    stepped_over(layers, tail, marked),
                    torch.enable_grad(),
                ):
                    model.base_model(input_ids=tokens.to(device), use_cache=False)
            except ModelError:
                raise
            except Exception as error:  # whatever a model raises that is given what it does not expect
                failed = failed or error
            if calls.complete:
                calls.check()
                return Stepping(tail, calls.handed_on)
    if failed is None:
        raise ModelError(f"{type(model).__name__} does not call these layers for text", "choose others: --layers PATH")
    raise ModelError(f"{type(model).__name__} cannot be run with its layers stepped over: {failed}", HINT) from failed


def capture(
    model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor, tail: int | None
) -> tuple[Tensor, list[Arguments]]:
    """What the first layer is given for these tokens, (sequences, tokens, hidden), and each layer's keyword arguments.

    Args:
        model: with weights outside its layers.
        layers: its decoder layers.
        tokens: int64, (sequences, tokens), on the model's device.
        tail: of `Stepping`.
    """
    states: list[Tensor] = []
    arguments: list[Arguments] = []

    def note(layer: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        hidden, others = _named(layer, positional, keywords)
        states.append(hidden)
        arguments.append(others)
        if len(arguments) == len(layers):
            raise _LayersReached

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(stepped_over(layers, tail))
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_LayersReached))
        model.base_model(input_ids=tokens, use_cache=False)
    return states[0], arguments


def different_tensors(one: Arguments, other: Arguments) -> list[str]:
    """The arguments of two calls that hold tensors which differ; NaN equals NaN, which layers' outputs show."""
    return [
        name
        for name in one
        if any(not _same(a, b) for a, b in zip(tensors_in(one[name]), tensors_in(other.get(name)), strict=False))
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Are two tensors equal, if NaN equals NaN?"""
    if torch.equal(one, other) or not (one.is_floating_point() and one.shape == other.shape):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def answer(tail: int | None, hidden: Tensor, marked: bool = False) -> Any:
    """What a layer returns that makes these states, with so many times None after them; `marked`: to be known by."""
    return hidden if tail is None else (hidden, *(_Beside(place) if marked else None for place in range(tail)))


def depends_on_tokens(model: nn.Module, name: str) -> ModelError:
    """The error of a model whose layers are passed more of the tokens than the states."""
    return ModelError(f"{type(model).__name__} passes its layers {name!r}, which depends on the tokens", HINT)


class _Calls:
    """The calls of a model's layers, and what is wrong with them."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self._model, self._layers = model, layers
        self._count = 0
        self._shape: torch.Size | None = None
        self._problem: ModelError | None = None
        self.handed_on: dict[int, str] = {}

    @property
    def complete(self) -> bool:
        """Has every layer been called?"""
        return self._count >= len(self._layers)

    def check(self) -> None:
        """Raise what was found."""
        if self._problem is not None:
            raise self._problem

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls that are made meanwhile."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                hook = partial(self._note, index)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _note(self, index: int, layer: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if index != self._count:
            raise ModelError(
                f"{type(self._model).__name__} calls decoder layer {index} "
                + ("more than once" if index < self._count else f"before layer {self._count}"),
                HINT,
            )
        hidden, others = _named(layer, positional, keywords)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape != (self._shape or hidden.shape):
            if index == 0:
                raise ModelError(
                    f"{type(self._model).__name__} gives its layers no states (sequences, tokens, hidden)", HINT
                )
            raise TypeError(f"layer {index} is given other states than layer 0")
        self._shape = hidden.shape
        self._count += 1
        for name, value in others.items():
            self.handed_on |= {one.place: name for one in _leaves(value) if isinstance(one, _Beside)}
            if any(one.requires_grad for one in tensors_in(value)):
                self._problem = self._problem or depends_on_tokens(self._model, name)


@contextmanager
def _of_tokens(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Let what embeddings make of the tokens, and all that depends on it, require a gradient, to be known by it."""

    def mark(_: nn.Module, positional: tuple[Any, ...], output: Tensor) -> Tensor | None:
        given = positional[0] if positional else None
        if isinstance(given, Tensor) and given.shape == tokens.shape and torch.equal(given.cpu(), tokens):
            return output.detach().requires_grad_().clone()
        return None

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(mark).remove)
        yield


@contextmanager
def stepped_over(layers: nn.ModuleList, tail: int | None, marked: bool = False) -> Iterator[None]:
    """Let layers do nothing but `answer`."""
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: answer(tail, hidden_states, marked)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # one layer may be there twice


def _named(layer: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, Arguments]:
    """The states and the other arguments of a layer's call, by their names."""
    given = dict(keywords)
    hidden = positional[0] if positional else given.pop("hidden_states")
    names = list(signature(type(layer).forward).parameters)[2:]  # without self and the states
    return hidden, {**dict(zip(names, positional[1:], strict=False)), **given}


def _leaves(value: Any) -> Iterator[Any]:
    """What is in tuples, lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and mappings."""
    return [one for one in _leaves(value) if isinstance(one, Tensor)]
