"""Step over a model's decoder layers: run it around them, and capture the arguments of their calls.

A layer can be computed by itself if its arguments (mask, positions), except the states, depend neither on the tokens
nor on the results of earlier layers; `find_stepping` makes sure of that.
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
TRIAL_TOKENS = 8  # in the sequence of a trial
# Numbers of values that layers may return after the states; None: they return the states alone.
TAILS: tuple[int | None, ...] = (None, 1, 0, 2, 3, 4, 5, 6, 7)
HINT = "such models cannot be pruned yet: open an issue that names it"


class _LayersReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a run once the last decoder layer is called."""


@dataclass(frozen=True)
class _TailValue:
    """Stands for a value that a layer returns after the states; its index among these values."""

    index: int


@dataclass(frozen=True)
class Stepping:
    """Form of the output of a layer that is stepped over.

    Attributes:
        tail: number of values after the states that the model expects; None: no tuple.
        handed_on: index of such a value → name of the next layer's argument to which the model passes it; these values
            have to be None when layers compute.
    """

    tail: int | None
    handed_on: dict[int, str]

    def check(self, model: nn.Module, output: Any) -> None:
        """Refuse an output that hands on more than the states to the next layer.

        Raises:
            ModelError: the output does.
        """
        for index, name in self.handed_on.items():
            if output[1 + index] is not None:
                raise ModelError(
                    f"{type(model).__name__} passes its layers {name!r}, which the layer before has made", HINT
                )


def find_stepping(model: PreTrainedModel, layers: nn.ModuleList, device: torch.device) -> Stepping:
    """Find the output that lets a model run with its layers stepped over.

    A model takes a layer's output as it is, or its first value, or unpacks a certain number of values: the form is
    found by trials.

    Args:
        model: the model, with weights of any value outside its layers.
        layers: its decoder layers.
        device: the model's device.

    Raises:
        ModelError: no form works; or a layer is called again, or out of order, or its arguments depend on the tokens.
    """
    # Falling token ids, so that an embedding of positions is not taken for the embedding of tokens.
    tokens = (torch.arange(TRIAL_TOKENS, 0, -1) % model.get_input_embeddings().weight.shape[0]).unsqueeze(0)
    failed: Exception | None = None
    for tail in TAILS:
        for marked in (True, False):  # some models look into the values
            calls = _Calls(model, layers)
            try:
                with (
                    calls.noted(),
                    _gradients_by_tokens(model, tokens),
                    stepped_over(layers, tail, marked),
                    torch.enable_grad(),
                ):
                    model.base_model(input_ids=tokens.to(device), use_cache=False)
            except ModelError:
                raise
            except Exception as error:  # models raise any error on an unexpected output
                failed = failed or error
            if calls.complete:
                calls.check()
                return Stepping(tail, calls.handed_on)
    if failed is None:
        raise ModelError(f"{type(model).__name__} does not call these layers for text", "choose others: --layers PATH")
    raise ModelError(f"{type(model).__name__} cannot be run with its layers stepped over: {failed}", HINT) from failed


def capture(
    model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor, tail: int | None, **inputs: Tensor
) -> tuple[Tensor, list[Arguments]]:
    """Capture the first layer's states, (sequences, tokens, hidden), and each layer's other arguments.

    Args:
        model: the model, with weights outside its layers.
        layers: its decoder layers.
        tokens: int64, (sequences, tokens), on the model's device.
        tail: `Stepping.tail`.
        inputs: further arguments of the model, as `position_ids`.
    """
    states: list[Tensor] = []
    arguments: list[Arguments] = []

    def note(layer: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        hidden, further = _named_arguments(layer, positional, keywords)
        states.append(hidden)
        arguments.append(further)
        if len(arguments) == len(layers):
            raise _LayersReached

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(stepped_over(layers, tail))
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_LayersReached))
        model.base_model(input_ids=tokens, use_cache=False, **inputs)
    return states[0], arguments


def different_tensors(first: Arguments, second: Arguments) -> list[str]:
    """Names of arguments whose tensors differ between two calls.

    NaN equals NaN, since NaN shows in the layers' outputs.
    """
    return [
        name
        for name in first
        if any(not _same(a, b) for a, b in zip(tensors_in(first[name]), tensors_in(second.get(name)), strict=False))
    ]


def _same(first: Tensor, second: Tensor) -> bool:
    """Test whether two tensors are equal, where NaN equals NaN."""
    if torch.equal(first, second) or not (first.is_floating_point() and first.shape == second.shape):
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def layer_output(tail: int | None, hidden: Tensor, marked: bool = False) -> Any:
    """Output of a layer with these states and `tail` values after them: None, or marked values."""
    return hidden if tail is None else (hidden, *(_TailValue(index) if marked else None for index in range(tail)))


def depends_on_tokens(model: nn.Module, name: str) -> ModelError:
    """Error of a model whose layers have an argument, besides the states, that depends on the tokens."""
    return ModelError(f"{type(model).__name__} passes its layers {name!r}, which depends on the tokens", HINT)


class _Calls:
    """Calls of a model's layers in a trial, and the problem found in them."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self._model, self._layers = model, layers
        self._count = 0
        self._shape: torch.Size | None = None
        self._problem: ModelError | None = None
        self.handed_on: dict[int, str] = {}

    @property
    def complete(self) -> bool:
        """True if every layer has been called."""
        return self._count >= len(self._layers)

    def check(self) -> None:
        """Raise the problem that was found, if any."""
        if self._problem is not None:
            raise self._problem

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the calls within the context."""
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
        hidden, further = _named_arguments(layer, positional, keywords)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape != (self._shape or hidden.shape):
            if index == 0:
                raise ModelError(
                    f"{type(self._model).__name__} gives its layers no states (sequences, tokens, hidden)", HINT
                )
            raise TypeError(f"layer {index} is given other states than layer 0")
        self._shape = hidden.shape
        self._count += 1
        for name, value in further.items():
            self.handed_on |= {leaf.index: name for leaf in _leaves(value) if isinstance(leaf, _TailValue)}
            if any(tensor.requires_grad for tensor in tensors_in(value)):
                self._problem = self._problem or depends_on_tokens(self._model, name)


@contextmanager
def _gradients_by_tokens(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Let embeddings of the tokens require a gradient, so that all that depends on them does."""

    def mark(_: nn.Module, positional: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ids = positional[0] if positional else None
        if isinstance(ids, Tensor) and ids.shape == tokens.shape and torch.equal(ids.cpu(), tokens):
            return output.detach().requires_grad_().clone()
        return None

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(mark).remove)
        yield


@contextmanager
def stepped_over(layers: nn.ModuleList, tail: int | None, marked: bool = False) -> Iterator[None]:
    """Let layers return `layer_output` of their states, within the context."""
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: layer_output(tail, hidden_states, marked)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # a layer may be in the list twice


def _named_arguments(
    layer: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[Any, Arguments]:
    """States, and further arguments by name, of a layer's call."""
    further = dict(keywords)
    hidden = positional[0] if positional else further.pop("hidden_states")
    names = list(signature(type(layer).forward).parameters)[2:]  # without self and the states
    return hidden, {**dict(zip(names, positional[1:], strict=False)), **further}


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values inside nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists and mappings."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]
