"""A decoder layer, run with hooks: inputs of linears, outputs of blocks. Its gradients: `gradients.py`.

The layer's own forward runs, with the captured keyword arguments. A block that is final is not computed again: its
module returns its kept output (a "replay"). A run ends as soon as its result is known.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError
from llm_barber.model.architecture import Block
from llm_barber.model.attention import fast_attention
from llm_barber.model.experts import Experts, mixture_of
from llm_barber.model.hooks import InputVisitor, LayerHooks, Reached


class DecoderLayer:
    """A decoder layer with weights on the device, and its prunable linears.

    Args:
        module: the layer.
        linears: paths of the prunable linears.
        arguments: returns the keyword arguments of the layer's call for a number of sequences and of tokens in each.
        transposed: linears store their weights as (in, out).
    """

    def __init__(
        self,
        module: nn.Module,
        linears: tuple[str, ...],
        arguments: Callable[[int, int], Mapping[str, Any]],
        transposed: bool = False,
    ) -> None:
        self.module = module
        self.linears = {name: module.get_submodule(name) for name in linears}
        self.experts = {name: child for name, child in module.named_modules() if isinstance(child, Experts)}
        self._arguments = arguments
        self._transposed = transposed
        self._groups: list[list[str]] = []  # linears that read the same tensor; known once inputs have been visited
        paths = Counter(id(child) for _, child in module.named_modules(remove_duplicate=False))
        # Linears that are the modules of several names, and so are called several times.
        self.called_again = {name for name, linear in self.linears.items() if paths[id(linear)] > 1}
        self.hooks = LayerHooks(module, self.called_again)
        # Number of values after the states in the tuple that the layer returns; None: it returns the states alone.
        self.tail: int | None = None  # known once the layer has run

    def select(self, linears: Collection[str]) -> None:
        """Restrict the layer to some of its linears."""
        self._groups = [[name for name in group if name in linears] for group in self._groups]
        self.linears = {name: linear for name, linear in self.linears.items() if name in linears}

    def belongs_to_expert(self, name: str) -> bool:
        """Test whether a linear belongs to an expert, which only some tokens reach."""
        return mixture_of(name) in self.experts

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.module.parameters()).dtype

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Point linears at other weights, (out, in), converted to the compute dtype."""
        for name, weight in weights.items():
            self.linears[name].weight.data = self._as_stored(weight.to(self.dtype))

    def _as_stored(self, weight: Tensor) -> Tensor:
        """View a weight, (out, in), in the layout in which linears store it."""
        return weight.t() if self._transposed else weight

    @torch.no_grad()
    def visit_inputs(self, hidden: Tensor, visitor: InputVisitor, stop: bool = True) -> Tensor | None:
        """Hand the inputs of every linear to `visitor`; return the output, or with `stop` end the run before.

        Linears that read the same tensor are visited with the same object; a linear of several names at each call.

        Raises:
            ModelError: a linear is not called.
        """
        with self.hooks.visited(self.linears, len(hidden), visitor, stop) as visits:
            output = self.run(hidden)
        self._groups = visits.groups
        if visits.waiting:
            raise ModelError(
                f"{type(self.module).__name__} does not call {', '.join(sorted(visits.waiting))}",
                "a fused kernel may take its weight instead: leave it uninstalled or switch it off; or --exclude it",
            )
        return output

    def input_groups(self, block: Block, hidden: Tensor) -> list[tuple[str, ...]]:
        """Group the block's linears that read the same tensor; groups are in the order of the calls."""
        if not self._groups:
            self.visit_inputs(hidden, lambda *_: None)
        groups: list[tuple[str, ...]] = []
        for group in self._groups:
            names = [name for name in group if name in block.linears]
            groups += [(name,) for name in names if name in self.called_again]
            groups.append(tuple(name for name in names if name not in self.called_again))
        return [group for group in groups if group]

    @torch.no_grad()
    def inputs_of(
        self, names: Collection[str], hidden: Tensor, replays: Mapping[str, Tensor], block: Block | None = None
    ) -> dict[str, Tensor]:
        """Inputs of some linears, (sequences, tokens, in), with the layer's present weights.

        Args:
            names: names of the linears.
            hidden: the layer's input, (sequences, tokens, hidden).
            replays: as in `block_output`.
            block: the run ends after this block, so that later calls of the linears are left out; None: no such end.
        """
        with ExitStack() as stack:
            inputs = stack.enter_context(self.hooks.noted(names, len(hidden), stop=True))
            if block is not None:
                stack.enter_context(self.hooks.stop_at(block, [], len(hidden)))
            stack.enter_context(self.hooks.replayed(replays))
            self.run(hidden)
        return inputs

    @contextmanager
    def same_routes(self) -> Iterator[None]:
        """Route tokens to experts as in the previous run, within the context."""
        with ExitStack() as stack:
            for experts in self.experts.values():
                stack.enter_context(experts.same_routes())
            yield

    @torch.no_grad()
    def block_output(self, block: Block, hidden: Tensor, replays: Mapping[str, Tensor]) -> Tensor:
        """Output of a block, (sequences, tokens, hidden).

        Args:
            block: the block.
            hidden: the layer's input, (sequences, tokens, hidden).
            replays: kept outputs of blocks that are final, by the path of their output module.
        """
        outputs: list[Tensor] = []
        with self.hooks.stop_at(block, outputs, len(hidden)), self.hooks.replayed(replays):
            self.run(hidden)
        return outputs[0]

    @torch.no_grad()
    def final_output(self, hidden: Tensor, block: Block, replays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs of a block and of the whole layer, both (sequences, tokens, hidden)."""
        outputs: list[Tensor] = []
        with self.hooks.stop_at(block, outputs, len(hidden), stop=False), self.hooks.replayed(replays):
            output = self.run(hidden)
        assert output is not None
        return outputs[0], output

    @torch.no_grad()
    def output(self, hidden: Tensor) -> Tensor:
        """Output of the layer, (sequences, tokens, hidden)."""
        output = self.run(hidden)
        assert output is not None
        return output

    def output_with(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Output of the layer, (sequences, tokens, hidden), with other weights; autograd may record it.

        Args:
            weights: weights (out, in) by linear, in the compute dtype.
            hidden: the layer's input, (sequences, tokens, hidden).
        """
        parameters = {f"{name}.weight": self._as_stored(weight) for name, weight in weights.items()}
        self._tell_experts(len(hidden))
        arguments = dict(self._arguments(hidden.shape[0], hidden.shape[1]))
        with fast_attention(hidden.device, self.dtype):
            output = torch.func.functional_call(self.module, parameters, (hidden,), arguments)
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        return states

    def forget_tokens(self) -> None:
        """Reset the count of tokens that each expert got; it is on the device, also if no tokens follow."""
        for experts in self.experts.values():
            experts.tokens = torch.zeros_like(experts.tokens, device=next(experts.parameters()).device)

    def _tell_experts(self, sequences: int) -> None:
        """Set the number of sequences of the next call."""
        for experts in self.experts.values():
            experts.sequences = sequences

    def run(self, hidden: Tensor) -> Tensor | None:
        """Run the layer; its output, or None if a hook ended the run."""
        self._tell_experts(len(hidden))
        try:
            with fast_attention(hidden.device, self.dtype):
                output = self.module(hidden, **self._arguments(hidden.shape[0], hidden.shape[1]))
        except Reached:
            return None
        states = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(states, Tensor):
            raise ModelError(
                f"{type(self.module).__name__} returns a {type(output).__name__}, neither states nor a tuple with them",
                "such models cannot be pruned yet: open an issue that names it",
            )
        if states.shape != hidden.shape:
            raise ModelError(
                f"{type(self.module).__name__} makes states of shape {tuple(states.shape)} from {tuple(hidden.shape)}",
                "models whose layers change the shape of the states cannot be pruned yet: open an issue that names it",
            )
        self.tail = None if isinstance(output, Tensor) else len(output) - 1
        return states
