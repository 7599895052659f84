"""One decoder layer, run with hooks: the inputs of its linears, the outputs of its blocks, per-sequence gradients.

The layer's own forward is what runs, with the keyword arguments as they were captured. A block that is final is
not computed again: its module answers with its kept output ("replay"). A run stops as soon as it has what it came for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError
from llm_barber.masking.statistics import FisherSums, GradientSquares
from llm_barber.model.architecture import Block
from llm_barber.model.attention import fast_attention
from llm_barber.model.experts import Experts
from llm_barber.model.fixed_order import FixedOrder, Found
from llm_barber.model.gradients import Ends, by_linear, by_sequence, mean_squares, scaled_by_sequence
from llm_barber.model.hooks import LayerHooks, Reached, removed

InputVisitor = Callable[[str, Tensor], None]


class DecoderLayer:
    """A decoder layer with weights on the device, and the linears that can be pruned.

    Args:
        module: the layer.
        linears: paths of the prunable linears.
        arguments: gives the keyword arguments of the layer's call for a number of sequences and of their tokens.
        transposed: linears keep their weights as (in, out).
        order: in which gradients are added up.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: tuple[str, ...],
        arguments: Callable[[int, int], Mapping[str, Any]],
        transposed: bool = False,
        order: FixedOrder | None = None,
    ) -> None:
        self.module = module
        self.linears = {name: module.get_submodule(name) for name in linears}
        self.experts = {name: one for name, one in module.named_modules() if isinstance(one, Experts)}
        self._arguments = arguments
        self._transposed = transposed
        self._order = order or FixedOrder()
        self._groups: list[list[str]] = []  # of linears that read one tensor, once inputs have been visited
        paths = Counter(id(one) for _, one in module.named_modules(remove_duplicate=False))
        # Linears that are modules of several names.
        self.called_again = {name for name, one in self.linears.items() if paths[id(one)] > 1}
        self.hooks = LayerHooks(module, self.called_again)
        # How many things follow the states in what it returns, found when it runs; None: it returns them alone.
        self.tail: int | None = None

    def select(self, linears: Collection[str]) -> None:
        """Look at some of the linears from now on."""
        self._groups = [[name for name in group if name in linears] for group in self._groups]
        self.linears = {name: linear for name, linear in self.linears.items() if name in linears}

    def belongs_to_expert(self, name: str) -> bool:
        """Is a linear an expert's, which some tokens only go to?"""
        return name.rpartition(".")[0].rpartition(".")[0] in self.experts

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.module.parameters()).dtype

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Point linears at other weights, (out, in), converted to the compute dtype if they have another."""
        for name, weight in weights.items():
            self.linears[name].weight.data = self._turned(weight.to(self.dtype))

    def _turned(self, weight: Tensor) -> Tensor:
        """As the linears keep it."""
        return weight.t() if self._transposed else weight

    @torch.no_grad()
    def visit_inputs(self, hidden: Tensor, visitor: InputVisitor) -> None:
        """Hand the inputs of every linear to `visitor`, (sequences, tokens, in), then stop.

        Linears that read the same tensor are visited one after the other with that same object; one that is called
        several times, as a module with several names is, is visited each time.

        Raises:
            ModelError: one of them is not called.
        """
        waiting = set(self.linears)
        latest: list[Tensor] = [hidden, hidden]
        self._groups = []

        def visit(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
                if positional[0] is not latest[0] or not self._groups:
                    latest[:] = positional[0], by_sequence(positional[0], len(hidden))
                    self._groups.append([])
                if name in waiting:
                    self._groups[-1].append(name)
                visitor(name, latest[1])
                waiting.discard(name)
                if not waiting and not self.called_again & self.linears.keys():
                    raise Reached

            return hook

        with removed(*(linear.register_forward_pre_hook(visit(name)) for name, linear in self.linears.items())):
            self._run(hidden)
        if waiting:
            raise ModelError(
                f"{type(self.module).__name__} does not call {', '.join(sorted(waiting))}",
                "a fused kernel may take its weight instead: leave it uninstalled or switch it off; or --exclude it",
            )

    def input_groups(self, block: Block, hidden: Tensor) -> list[tuple[str, ...]]:
        """The block's linears in the order in which data flows through them; those that read one tensor together."""
        if not self._groups:
            self.visit_inputs(hidden, lambda *_: None)
        found: list[tuple[str, ...]] = []
        for group in self._groups:
            own = [name for name in group if name in block.linears]
            found += [(name,) for name in own if name in self.called_again]
            found.append(tuple(name for name in own if name not in self.called_again))
        return [group for group in found if group]

    @torch.no_grad()
    def inputs_of(
        self, names: Collection[str], hidden: Tensor, replays: Mapping[str, Tensor], block: Block | None = None
    ) -> dict[str, Tensor]:
        """The inputs of some linears, (sequences, tokens, in), with the layer's present weights; no more is computed.

        Args:
            names: of the linears.
            hidden: the layer's input, (sequences, tokens, hidden).
            replays: as in `block_output`.
            block: what they are given after it, if they are called again, does not count.
        """
        with ExitStack() as stack:
            found = stack.enter_context(self.hooks.noted(names, len(hidden), stop=True))
            if block is not None:
                stack.enter_context(self.hooks.stop_at(block, [], len(hidden)))
            stack.enter_context(self.hooks.replayed(replays))
            self._run(hidden)
        return found

    @contextmanager
    def same_routes(self) -> Iterator[None]:
        """Route tokens to experts as in the run before."""
        with ExitStack() as stack:
            for experts in self.experts.values():
                stack.enter_context(experts.same_routes())
            yield

    @torch.no_grad()
    def block_output(self, block: Block, hidden: Tensor, replays: Mapping[str, Tensor]) -> Tensor:
        """The block's output, (sequences, tokens, hidden), on the layer's input `hidden`.

        Args:
            block: which.
            hidden: (sequences, tokens, hidden).
            replays: kept outputs of blocks that are final, by the path of their output module.
        """
        found: list[Tensor] = []
        with self.hooks.stop_at(block, found, len(hidden)), self.hooks.replayed(replays):
            self._run(hidden)
        return found[0]

    def block_gradients(
        self,
        block: Block,
        hidden: Tensor,
        sparse_output: Tensor,
        replays: Mapping[str, Tensor],
        squares: Mapping[str, GradientSquares],
    ) -> tuple[Tensor, Tensor]:
        """Add the squared per-sequence gradients of the reconstruction error at the layer's present weights.

        The loss of a sequence is mean((y − y_sparse)²) over its tokens and channels (arXiv 2408.10631).
        No gradient of a weight is formed by autograd: it would sum over the batch. Gradients of the linears' outputs
        are taken, and each sequence's weight gradient is their product with its inputs.

        Args:
            block: which.
            hidden: the layer's input, (sequences, tokens, hidden).
            sparse_output: the block's output with the pruned weights, (sequences, tokens, hidden).
            replays: as in `block_output`.
            squares: running statistics of the block's linears.

        Returns:
            The block's output y, (sequences, tokens, hidden), detached, and the losses, float32 (sequences,).

        Raises:
            ModelError: y does not depend on a linear.
        """

        def once() -> tuple[list[Ends], Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
            found: list[Tensor] = []
            recorded, stopped = self.hooks.recorded(block.linears), self.hooks.stop_at(block, found, len(hidden))
            with recorded as ends, stopped, self.hooks.replayed(replays):
                self._run(hidden)
            difference = found[0].detach().float() - sparse_output.float()
            scaled, scale = scaled_by_sequence(difference, found[0].dtype)
            gradients = torch.autograd.grad(found[0], [end.output for end in ends], scaled, allow_unused=True)
            return ends, found[0].detach(), difference, scale, gradients

        ends, output, difference, scale, gradients = self.compute_gradients(once)
        # d mean(d²)/dy = 2 d / (tokens · channels)
        factor = scale * (2 / difference[0].numel())
        for name, both in by_linear(ends, gradients, len(hidden), block.output).items():
            squares[name].update(*both, factor)
        return output, mean_squares(difference)

    def loss_gradients(self, hidden: Tensor, gradient: Tensor, sums: Mapping[str, FisherSums]) -> Tensor:
        """Carry the gradient of a loss from the layer's output to its input, and add what it is at the linears.

        Args:
            hidden: the layer's input, (sequences, tokens, hidden).
            gradient: by the layer's output, float32, (sequences, tokens, hidden).
            sums: running statistics of the linears.

        Returns:
            The gradient by `hidden`, float32, (sequences, tokens, hidden).

        Raises:
            ModelError: the output does not depend on a linear.
        """
        hidden = hidden.detach().requires_grad_()

        def once() -> tuple[list[Ends], Tensor, tuple[Tensor | None, ...]]:
            with self.hooks.recorded(tuple(self.linears)) as ends:
                output = self._run(hidden)
            assert output is not None
            scaled, scale = scaled_by_sequence(gradient, output.dtype)
            wanted = [hidden, *(end.output for end in ends)]
            return ends, scale, torch.autograd.grad(output, wanted, scaled, allow_unused=True)

        ends, scale, (before, *gradients) = self.compute_gradients(once)
        for name, found in by_linear(ends, gradients, len(hidden), "the decoder layer").items():
            sums[name].update(*found, scale)
        assert before is not None
        return before.float() * scale.view(-1, 1, 1)

    def compute_gradients(self, once: Callable[[], Found]) -> Found:
        """What `once` gives, which runs the layer and takes gradients, in a fixed order if that can be had."""
        counted = {name: one.tokens.clone() for name, one in self.experts.items()}

        def undo() -> None:
            for name, one in self.experts.items():
                one.tokens.copy_(counted[name])

        with torch.enable_grad():
            return self._order.compute(once, undo)

    @torch.no_grad()
    def final_output(self, hidden: Tensor, block: Block, replays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The output of a block and of the whole layer, both (sequences, tokens, hidden)."""
        found: list[Tensor] = []
        with self.hooks.stop_at(block, found, len(hidden), stop=False), self.hooks.replayed(replays):
            output = self._run(hidden)
        assert output is not None
        return found[0], output

    @torch.no_grad()
    def output(self, hidden: Tensor) -> Tensor:
        """The layer's output, (sequences, tokens, hidden)."""
        output = self._run(hidden)
        assert output is not None
        return output

    def output_with(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The layer's output with other weights of its linears, (sequences, tokens, hidden); with its graph, if wanted.

        Args:
            weights: (out, in), by linear, in the compute dtype.
            hidden: (sequences, tokens, hidden).
        """
        parameters = {f"{name}.weight": self._turned(weight) for name, weight in weights.items()}
        self._tell_experts(len(hidden))
        arguments = dict(self._arguments(hidden.shape[0], hidden.shape[1]))
        with fast_attention(hidden.device, self.dtype):
            output = torch.func.functional_call(self.module, parameters, (hidden,), arguments)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def forget_tokens(self) -> None:
        """Begin to count anew how many tokens each expert is given."""
        for experts in self.experts.values():
            experts.tokens.zero_()

    def _tell_experts(self, sequences: int) -> None:
        for experts in self.experts.values():
            experts.sequences = sequences

    def _run(self, hidden: Tensor) -> Tensor | None:
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
