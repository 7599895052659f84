"""Look into a decoder layer while it runs: notes of what passes its modules, early ends, kept outputs for new ones."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.model.architecture import Block
from llm_barber.model.gradients import Ends, by_sequence


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """What the run came for is there."""


class LayerHooks:
    """What can be put on the modules of a layer for a while.

    Args:
        module: the layer.
        called_again: linears that are modules of several names.
    """

    def __init__(self, module: nn.Module, called_again: Collection[str]) -> None:
        self._module = module
        self._called_again = frozenset(called_again)
        # The rest of a block's output tuple (attention weights), by block: what a replay has to hand back.
        self._output_tail: dict[str, tuple[Any, ...] | list[Any] | None] = {}
        self._flattened: dict[str, bool] = {}

    @contextmanager
    def noted(self, names: Collection[str], sequences: int, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Put linears' inputs, (sequences, tokens, in), in the mapping as they run; `stop`: and end the run then.

        What a linear is called with again follows as more tokens.
        """
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
                inputs = by_sequence(positional[0], sequences)
                found[name] = torch.cat([found[name], inputs], 1) if name in found else inputs
                if stop and len(found) == len(names) and not self._called_again.intersection(names):
                    raise Reached

            return hook

        with removed(*(self._module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names)):
            yield found

    @contextmanager
    def recorded(self, linears: tuple[str, ...]) -> Iterator[list[Ends]]:
        """Note what goes into linears and comes out of them, call by call."""
        ends: list[Ends] = []

        def record(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # Weights ask for no gradient, so that autograd forms none; the graph starts at the first outputs.
                output = output if output.requires_grad else output.requires_grad_()
                ends.append(Ends(name, positional[0].detach(), output))
                return output

            return hook

        with removed(*(self._module.get_submodule(name).register_forward_hook(record(name)) for name in linears)):
            yield ends

    @contextmanager
    def stop_at(self, block: Block, found: list[Tensor], sequences: int, stop: bool = True) -> Iterator[None]:
        """Put the block's output in `found`, and end the run there."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self._output_tail[block.output] = None if isinstance(output, Tensor) else output[1:]
            self._flattened[block.output] = tensor.dim() == 2
            found.append(by_sequence(tensor, sequences))
            if stop:
                raise Reached

        with removed(self._module.get_submodule(block.output).register_forward_hook(hook)):
            yield

    @contextmanager
    def replayed(self, replays: Mapping[str, Tensor]) -> Iterator[None]:
        """Let modules answer with kept outputs instead of computing them."""
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
    """Hooks that are taken off at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
