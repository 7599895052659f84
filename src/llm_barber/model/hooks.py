"""Hooks on a decoder layer's modules: note inputs and outputs, end a run early, replay kept outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.model.architecture import Block
from llm_barber.model.gradients import LinearCall, by_sequence

InputVisitor = Callable[[str, Tensor], None]


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
        self._called_again = frozenset(called_again)
        # By block, what follows the states in its output tuple (attention weights): a replay returns it, too.
        self._output_tail: dict[str, tuple[Any, ...] | list[Any] | None] = {}
        self._flattened: dict[str, bool] = {}  # by block: its output is (sequences · tokens, hidden)

    @contextmanager
    def visited(
        self, linears: Collection[str], sequences: int, visitor: InputVisitor, stop: bool = True
    ) -> Iterator[Visits]:
        """Hand each linear's input, (sequences, tokens, in), to `visitor`; with `stop` the last linear ends the run.

        Linears that read the same tensor are handed the same object.
        """
        visits = Visits([], set(linears))
        latest: list[Tensor] = []  # the tensor that was read last, and the same by sequence

        def visit(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
                if not latest or positional[0] is not latest[0]:
                    latest[:] = positional[0], by_sequence(positional[0], sequences)
                    visits.groups.append([])
                if name in visits.waiting:
                    visits.groups[-1].append(name)
                visitor(name, latest[1])
                visits.waiting.discard(name)
                if stop and not visits.waiting and not self._called_again.intersection(linears):
                    raise Reached

            return hook

        with removed(*(self._module.get_submodule(name).register_forward_pre_hook(visit(name)) for name in linears)):
            yield visits

    @contextmanager
    def noted(self, names: Collection[str], sequences: int, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collect the inputs of linears, (sequences, tokens, in), in the mapping that is yielded.

        Inputs of further calls of a linear follow as more tokens. With `stop` the run ends after the last input.
        """
        collected: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
                inputs = by_sequence(positional[0], sequences)
                collected[name] = torch.cat([collected[name], inputs], 1) if name in collected else inputs
                if stop and len(collected) == len(names) and not self._called_again.intersection(names):
                    raise Reached

            return hook

        with removed(*(self._module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names)):
            yield collected

    @contextmanager
    def recorded(self, linears: tuple[str, ...]) -> Iterator[list[LinearCall]]:
        """Collect the calls of linears, with their inputs and outputs, in the list that is yielded."""
        calls: list[LinearCall] = []

        def record(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # Weights require no gradient, so that autograd forms none: the graph starts at the first outputs.
                output = output if output.requires_grad else output.requires_grad_()
                calls.append(LinearCall(name, positional[0].detach(), output))
                return output

            return hook

        with removed(*(self._module.get_submodule(name).register_forward_hook(record(name)) for name in linears)):
            yield calls

    @contextmanager
    def stop_at(self, block: Block, outputs: list[Tensor], sequences: int, stop: bool = True) -> Iterator[None]:
        """Append the block's output, (sequences, tokens, hidden), to `outputs`; with `stop`, end the run."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self._output_tail[block.output] = None if isinstance(output, Tensor) else output[1:]
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


@contextmanager
def removed(*handles: Any) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
