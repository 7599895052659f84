"""Hooks on a decoder layer's modules: note inputs and outputs, end a run early, replay kept outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.model.architecture import Block
from llm_barber.model.experts import Experts, mixture_of
from llm_barber.model.gradients import LinearCall, Rows, Splitter, by_sequence
from llm_barber.model.routes import SequenceView

InputVisitor = Callable[[list[Rows]], None]  # takes the inputs of a linear, or of the same linear of several experts
# Takes the inputs of a linear, or of the same linear of several experts; their output, None before it is computed; and
# what splits such tensors by linear and sequence. Returns what the layer goes on with instead of the output, or None.
_Listener = Callable[[Tensor, Tensor | None, Splitter], Tensor | None]


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a run that has computed what it was started for."""


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
        self._experts = {path: child for path, child in module.named_modules() if isinstance(child, Experts)}
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
        latest: list[Tensor] = []  # the tensor that was read last
        groups: list[list[str]] = []  # of `visits`: the linears that read it

        def visit(read: Tensor, _: Tensor | None, split: Splitter) -> None:
            rows = split(read)
            names = [name for part in rows for name in part.names]
            if not latest or read is not latest[0]:
                latest[:] = [read]
                groups[:] = [[] for _ in names]
                visits.groups.extend(groups)
            for name, group in zip(names, groups, strict=True):
                if name in visits.waiting:
                    group.append(name)
            visitor(rows)
            visits.waiting.difference_update(names)
            if stop and not visits.waiting and not self._called_again.intersection(linears):
                raise Reached

        with self._heard(linears, sequences, visit, before=True):
            yield visits

    @contextmanager
    def noted(self, names: Collection[str], sequences: int, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collect the inputs of linears, (sequences, tokens, in), in the mapping that is yielded.

        Inputs of further calls of a linear follow as more tokens. With `stop` the run ends after the last input.
        """
        collected: dict[str, Tensor] = {}

        def note(read: Tensor, _: Tensor | None, split: Splitter) -> None:
            for rows in split(read):
                for name, inputs in zip(rows.names, rows.values, strict=True):
                    if name is not None:
                        collected[name] = torch.cat([collected[name], inputs], 1) if name in collected else inputs
            if stop and len(collected) == len(names) and not self._called_again.intersection(names):
                raise Reached

        with self._heard(names, sequences, note, before=True):
            yield collected

    @contextmanager
    def recorded(self, linears: Collection[str], sequences: int) -> Iterator[list[LinearCall]]:
        """Collect the calls of linears, with their inputs and outputs, in the list that is yielded."""
        calls: list[LinearCall] = []

        def record(inputs: Tensor, output: Tensor | None, split: Splitter) -> Tensor:
            assert output is not None
            # Weights require no gradient, and autograd computes none for them: the graph starts at the first outputs.
            calls.append(LinearCall(inputs.detach(), output.requires_grad_(), split))
            alias: Tensor = _Alias.apply(output)  # type: ignore[no-untyped-call]  # PyTorch's
            return alias

        with self._heard(linears, sequences, record, before=False):
            yield calls

    @contextmanager
    def _heard(self, linears: Collection[str], sequences: int, listener: _Listener, before: bool) -> Iterator[None]:
        """Call a function `before` or after each call of linears, within the context."""
        latest: list[Tensor] = []  # the input that was split last, and the same by sequence

        def split(name: str, values: Tensor) -> list[Rows]:
            if not latest or values is not latest[0]:
                latest[:] = values, by_sequence(values, sequences).unsqueeze(0)
            return [Rows((name,), latest[1])]

        def split_call(path: str, linear: str, view: SequenceView, values: Tensor) -> list[Rows]:
            names = ([f"{path}.{expert}.{linear}" for expert in experts] for experts, _ in view(values))
            chosen = (tuple(name if name in linears else None for name in of_part) for of_part in names)
            return [Rows(of_part, part) for of_part, (_, part) in zip(chosen, view(values), strict=True)]

        def of_linear(name: str) -> Callable[..., Tensor | None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor | None:
                return listener(positional[0], output, partial(split, name))

            return hook

        def of_experts(path: str) -> Callable[..., Tensor | None]:
            def hear(linear: str, inputs: Tensor, output: Tensor | None, view: SequenceView) -> Tensor | None:
                if any(f"{path}.{expert}.{linear}" in linears for expert in view.bucket.experts):
                    return listener(inputs, output, partial(split_call, path, linear, view))
                return None

            return hear

        handles = []
        paths = self._experts.keys() & map(mixture_of, linears)
        for name in linears:
            module = self._module.get_submodule(name)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            if mixture_of(name) not in paths:
                handles.append(register(of_linear(name)))
        handles += [self._experts[path].listen(of_experts(path), before) for path in paths]
        with removed(*handles):
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

        with removed(self._module.get_submodule(block.output).register_forward_hook(hook)):
            yield

    @contextmanager
    def replayed(self, replays: Mapping[str, Tensor]) -> Iterator[None]:
        """Let modules return kept outputs, (sequences, tokens, hidden) by path, instead of computing them."""
        modules = [self._module.get_submodule(path) for path in replays]
        before = [vars(module).get("forward") for module in modules]  # set by `fused_*.py`, on a GPU
        for module, (path, output) in zip(modules, replays.items(), strict=True):
            tensor = output.flatten(0, 1) if self._flattened[path] else output
            tail = self._output_tail[path]
            answer: Any = tensor if tail is None else (tensor, *tail)
            answer = list(answer) if isinstance(tail, list) else answer
            module.forward = lambda *_, _answer=answer, **__: _answer
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


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


@contextmanager
def removed(*handles: Any) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
