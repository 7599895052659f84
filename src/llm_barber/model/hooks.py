"""Hooks on a decoder layer's modules: note inputs and outputs, end a run early, replay kept outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_barber.model.architecture import Block

InputVisitor = Callable[[str, Tensor], None]  # takes a linear's name and its inputs, (sequences, tokens, in)
# Takes a linear's name, its inputs, and its output, None before it is computed. Returns what the layer goes on with
# instead of the output, or None.
_Listener = Callable[[str, Tensor, Tensor | None], Tensor | None]


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a run that has computed what it was started for."""


class LinearCall(NamedTuple):
    """One call of a linear: its inputs, detached, (…, in), and its output, (…, out), in the graph."""

    name: str
    inputs: Tensor
    output: Tensor


@dataclass(frozen=True)
class Visits:
    """Calls of the linears of a run.

    Attributes:
        groups: names of linears, in the order of calls; those that read the same tensor together.
        waiting: names of the linears that were not called yet.
    """

    groups: list[list[str]]
    waiting: set[str]


class LayerHooks:
    """Hooks on the modules of a layer, each for as long as its context lasts.

    Args:
        module: the layer.
        called_again: linears that are the modules of several names, and so are called several times.
    """

    def __init__(self, module: nn.Module, called_again: Collection[str]) -> None:
        self._module = module
        self._called_again = frozenset(called_again)
        # By block, what follows the states in its output tuple: a replay returns it, too, but for attention weights,
        # which are large and which no layer reads.
        self._output_tail: dict[str, tuple[Any, ...] | list[Any] | None] = {}
        self._flattened: dict[str, bool] = {}  # by block: its output is (sequences · tokens, hidden)

    @contextmanager
    def visited(
        self, linears: Collection[str], sequences: int, visitor: InputVisitor, stop: bool = True
    ) -> Iterator[Visits]:
        """Hand the linears' inputs to `visitor`; with `stop` the last linear ends the run.

        Linears that read the same tensor are handed the same object.
        """
        visits = Visits([], set(linears))
        latest: list[Tensor] = []  # the tensor that was read last, as it was read and by sequence

        def visit(name: str, read: Tensor, _: Tensor | None) -> None:
            if not latest or read is not latest[0]:
                latest[:] = read, by_sequence(read, sequences)
                visits.groups.append([])
            if name in visits.waiting:
                visits.groups[-1].append(name)
            visitor(name, latest[1])
            visits.waiting.discard(name)
            if stop and not visits.waiting and not self._called_again.intersection(linears):
                raise Reached

        with self._heard(linears, visit, before=True):
            yield visits

    @contextmanager
    def noted(self, names: Collection[str], sequences: int, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collect the inputs of linears, (sequences, tokens, in), in the mapping that is yielded.

        Inputs of further calls of a linear follow as more tokens. With `stop` the run ends after the last input.
        """
        collected: dict[str, Tensor] = {}

        def note(name: str, inputs: Tensor) -> None:
            collected[name] = torch.cat([collected[name], inputs], 1) if name in collected else inputs

        with self.visited(names, sequences, note, stop):
            yield collected

    @contextmanager
    def recorded(self, linears: Collection[str]) -> Iterator[list[LinearCall]]:
        """Collect the calls of linears, with their inputs and outputs, in the list that is yielded."""
        calls: list[LinearCall] = []

        def record(name: str, inputs: Tensor, output: Tensor | None) -> Tensor:
            assert output is not None
            # Weights require no gradient, and autograd computes none for them: the graph starts at the first outputs.
            calls.append(LinearCall(name, inputs.detach(), output.requires_grad_()))
            alias: Tensor = _Alias.apply(output)  # type: ignore[no-untyped-call]  # PyTorch's
            return alias

        with self._heard(linears, record, before=False):
            yield calls

    @contextmanager
    def _heard(self, linears: Collection[str], listener: _Listener, before: bool) -> Iterator[None]:
        """Call a function `before` or after each call of linears, within the context."""

        def hook_of(name: str) -> Callable[..., Tensor | None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor | None:
                return listener(name, positional[0], output)

            return hook

        with ExitStack() as stack:
            for name in linears:
                module = self._module.get_submodule(name)
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(register(hook_of(name)).remove)
            yield

    @contextmanager
    def stop_at(self, block: Block, outputs: list[Tensor], sequences: int, stop: bool = True) -> Iterator[None]:
        """Append the block's output, (sequences, tokens, hidden), to `outputs`; with `stop`, end the run."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self._output_tail[block.output] = None if isinstance(output, Tensor) else _without_weights(output[1:])
            self._flattened[block.output] = tensor.dim() == 2
            outputs.append(by_sequence(tensor, sequences))
            if stop:
                raise Reached

        handle = self._module.get_submodule(block.output).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replayed(self, replays: Mapping[str, Tensor]) -> Iterator[None]:
        """Let modules return kept outputs, (sequences, tokens, hidden) by path, instead of computing them."""
        modules = [self._module.get_submodule(path) for path in replays]
        for module, (path, output) in zip(modules, replays.items(), strict=True):
            tensor = output.flatten(0, 1) if self._flattened[path] else output
            tail = self._output_tail[path]
            answer: Any = tensor if tail is None else (tensor, *tail)
            answer = list(answer) if isinstance(tail, list) else answer
            module.forward = lambda *_, _answer=answer, **__: _answer
        try:
            yield
        finally:
            for module in modules:
                del module.forward


class _Alias(torch.autograd.Function):
    """A linear's output in a tensor that the layer may change in place; the gradient is by the output before that.

    OLMo clamps its queries, keys and values in place.
    """

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return values.data  # `detach` would be a view, and a change in place would rewrite the history of `values`

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _without_weights(values: tuple[Any, ...] | list[Any]) -> tuple[Any, ...] | list[Any]:
    """Replace attention weights, (sequences, heads, tokens, tokens), by None."""
    return type(values)(None if isinstance(value, Tensor) and value.dim() == 4 else value for value in values)


def by_sequence(activations: Tensor, sequences: int) -> Tensor:
    """Reshape to (sequences, tokens, features); some layers flatten to (sequences · tokens, features)."""
    return activations.reshape(sequences, -1, activations.shape[-1])
