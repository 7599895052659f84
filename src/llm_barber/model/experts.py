"""Mixtures of experts: give each expert its own linears, in place of transformers' 3-D parameters.

Most checkpoints store experts one by one, and each expert is pruned from the tokens that are routed to it. A route is
one of the k experts of a token. An expert computes the rows of its routes sequence after sequence: each sequence is
padded with zeros to the same number of rows, at least one. So hooks on its linears see inputs and outputs by sequence,
also of an expert without tokens. Zeros add nothing to any statistic.

Rows are gathered by `take`, forward and backward, and never scattered: no sum depends on the order in which threads
arrive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError

GATE_UP, GATE, UP, DOWN, BIAS = "gate_up_proj", "gate_proj", "up_proj", "down_proj", "_bias"
Linear = Callable[[str, Tensor], Tensor]  # of a linear's name and its inputs


@dataclass(frozen=True)
class Part:
    """Part of a stacked parameter that is one expert's parameter.

    Attributes:
        name: name of the expert's parameter, inside the module.
        expert: number of the expert.
        rows: first row, and the row after the last, of (out, in).
        transposed: the stacked parameter is (experts, in, out).
    """

    name: str
    expert: int
    rows: tuple[int, int | None] = (0, None)
    transposed: bool = False

    def of(self, stacked: Tensor) -> Tensor:
        """View the expert's part of a stacked tensor, (experts, …)."""
        matrix = stacked[self.expert]
        return (matrix.t() if self.transposed else matrix)[slice(*self.rows)]


class Experts(nn.ModuleList):
    """Experts of a layer, each a module with linears, in place of a module with 3-D parameters.

    The 3-D parameters are `gate_up_proj`, (experts, 2 · inner, hidden), and `down_proj`, (experts, hidden, inner). An
    expert gets `gate_proj`, `up_proj` and `down_proj` if the rows of gates come first. Otherwise, or with biases, it
    gets `gate_up_proj` and `down_proj`; without gates, `up_proj` and `down_proj`.

    Attributes:
        sequences: number of sequences of the next call; its tokens are whole sequences, one after the other.
        tokens: number of tokens that each expert got since `DecoderLayer.forget_tokens`, int64 (experts,).
        transposed: the 3-D parameters are (experts, in, out).
        first_linear: name of the 3-D parameter in front of the activation: `gate_up_proj` or `up_proj`.
        separate: `gate_proj` and `up_proj` are linears of their own.
        biased: the linears have biases.
        inner: number of inner channels of an expert.
        combine: takes a function of a linear's name and inputs, and the inputs, (rows, hidden); returns the inputs of
            `down_proj`, (rows, inner).
    """

    combine: Callable[[Linear, Tensor], Tensor]

    def __init__(self, fused: nn.Module) -> None:
        self.transposed = bool(getattr(fused, "is_transposed", False))
        self.first_linear = UP if UP in fused._parameters else GATE_UP
        first, down = fused.get_parameter(self.first_linear), fused.get_parameter(DOWN)
        hidden, inner = down.shape[1:] if not self.transposed else down.shape[:0:-1]
        rows = first.shape[2 if self.transposed else 1]
        bias = f"{DOWN}{BIAS}" in fused._parameters
        self.separate = self.first_linear == GATE_UP and not self.transposed and not bias
        shapes = {self.first_linear: (rows, hidden), DOWN: (hidden, inner)}
        if self.separate:
            shapes = {GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner)}
        super().__init__(_expert(shapes, bias, first) for _ in range(len(down)))
        self.inner = inner
        self.biased = bias
        # Set as a submodule, it would be one more expert.
        self.__dict__["combine"] = _combine(fused, self.first_linear == GATE_UP, self.separate)
        self.sequences = 1
        self.tokens = torch.zeros(len(down), dtype=torch.int64, device="cpu")  # parameters may be on meta
        self._routes: tuple[Tensor, Tensor] | None = None
        self._same_routes = False

    def parts(self, parameter: str) -> list[Part]:
        """Experts' parameters that a stacked parameter of transformers' module contains."""
        linear, bias = parameter.removesuffix(BIAS), parameter.endswith(BIAS)
        leaf, transposed = "bias" if bias else "weight", self.transposed and not bias
        rows: dict[str, tuple[int, int | None]] = {linear: (0, None)}
        if self.separate and linear == GATE_UP:
            rows = {GATE: (0, self.inner), UP: (self.inner, None)}
        return [
            Part(f"{number}.{name}.{leaf}", number, of_linear, transposed)
            for number in range(len(self))
            for name, of_linear in rows.items()
        ]

    @contextmanager
    def same_routes(self) -> Iterator[None]:
        """Route as in the previous call, whatever the router says, within the context.

        So the experts of two models get the same tokens.
        """
        self._same_routes = True
        try:
            yield
        finally:
            self._same_routes = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the experts' outputs, (tokens, hidden).

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: int64, (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), the weights of these experts.
        """
        if self._same_routes and self._routes is not None:
            top_k_index, top_k_weights = self._routes
        self._routes = (top_k_index, top_k_weights)
        routes = Routes(top_k_index, len(self), self.sequences)
        self.tokens = self.tokens.to(hidden_states.device) + routes.counts
        outputs = []
        for expert, inputs, padding in zip(self, routes.inputs(hidden_states), routes.padding(), strict=True):
            linear = partial(_call_linear, expert)
            inner = self.combine(linear, inputs)
            if self.biased:  # biases have made the padding nonzero
                inner = inner.masked_fill(padding, 0)
            outputs.append(linear(DOWN, inner))
        weighted = routes.outputs(outputs) * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def _call_linear(expert: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """Outputs of an expert's linear, (rows, out)."""
    return cast(Tensor, expert.get_submodule(name)(inputs))


class Routes:
    """Routes of whole sequences of tokens, and the rows in which experts compute them, expert after expert.

    Each sequence of an expert has as many rows as the expert's sequence with the most tokens, at least one. The host
    waits for a GPU once, for these sizes.

    Attributes:
        counts: number of tokens of each expert, int64 (experts,).

    Args:
        top_k_index: int64, (tokens, k), the experts of each token.
        experts: number of experts.
        sequences: number of sequences; each has as many tokens, one after the other.
    """

    def __init__(self, top_k_index: Tensor, experts: int, sequences: int) -> None:
        tokens, chosen = top_k_index.shape
        routed = top_k_index.flatten()
        order = routed.argsort(stable=True)
        expert = routed[order]
        sequence = order // (chosen * (tokens // sequences))
        group = expert * sequences + sequence
        groups = torch.arange(experts * sequences, device=group.device)
        first, after = (torch.searchsorted(group, groups, right=right) for right in (False, True))
        sizes = (after - first).view(experts, sequences)
        self.counts = sizes.sum(1)
        rooms = sizes.amax(1).clamp_min(1)
        self._rows = (rooms * sequences).tolist()
        ends = (rooms * sequences).cumsum(0)
        in_group = torch.arange(len(group), device=group.device) - first[group]
        slot = (ends - rooms * sequences)[expert] + rooms[expert] * sequence + in_group
        self._slots = torch.empty_like(order)  # the row of each route, token · k + choice
        self._routes = order.new_full((sum(self._rows),), -1)  # the route of each row; -1: padding
        self._slots[order], self._routes[slot] = slot, order
        self._slots = self._slots.view(top_k_index.shape)
        self._has_padding = len(self._routes) > len(order)

    def inputs(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Rows of each expert, (rows, hidden), of the tokens' states, (tokens, hidden)."""
        token = self._routes.div(self._slots.shape[1], rounding_mode="floor")
        return torch.split(take(hidden, token, self._slots, self._has_padding), self._rows)

    def padding(self) -> tuple[Tensor, ...]:
        """Rows of each expert that are padded, bool (rows, 1)."""
        return torch.split((self._routes < 0).unsqueeze(1), self._rows)

    def outputs(self, rows: list[Tensor]) -> Tensor:
        """Rows of the routes, (tokens · k, features) in the order of tokens, from each expert's rows."""
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        return take(joined, self._slots.flatten(), self._routes.unsqueeze(1), False, self._has_padding)


def mixture_of(linear: str) -> str:
    """Path of the experts to which a linear belongs, if it is an expert's; else the path of some module."""
    return linear.rpartition(".")[0].rpartition(".")[0]


def split_experts(model: nn.Module) -> None:
    """Replace every mixture of experts in a model by `Experts`.

    Raises:
        ModelError: the experts compute more than `Experts` does.
    """
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if is_fused(child):
                if getattr(child, "has_post_expert_norm", False) or not hasattr(child, "_apply_gate"):
                    raise ModelError(
                        f"{path}.{name}: experts that are computed in a way of their own are not supported",
                        "open an issue that names the model",
                    )
                setattr(module, name, Experts(child))


def is_fused(module: nn.Module) -> bool:
    """Test for experts in 3-D parameters, (experts, out, in) or (experts, in, out)."""
    down, first = (module._parameters.get(name) for name in (DOWN, GATE_UP if GATE_UP in module._parameters else UP))
    return down is not None and first is not None and down.dim() == first.dim() == 3


class _Linear(nn.Linear):
    """A linear that is not initialised, since its values are loaded."""

    def reset_parameters(self) -> None:
        """Skip the initialisation."""


def _expert(shapes: dict[str, tuple[int, int]], bias: bool, like: Tensor) -> nn.Module:
    """Module with linears of these shapes, (out, in), with dtype and device of `like`."""
    return nn.ModuleDict(
        {
            name: _Linear(columns, rows, bias=bias, dtype=like.dtype, device=like.device)
            for name, (rows, columns) in shapes.items()
        }
    )


def _combine(fused: nn.Module, gated: bool, separate: bool) -> Callable[[Linear, Tensor], Tensor]:
    """Function of experts' linears and inputs that computes the inputs of their down projections."""
    if not gated:
        activation = cast(Callable[[Tensor], Tensor], fused.act_fn)
        return lambda linear, inputs: activation(linear(UP, inputs))
    gate = cast(Callable[[Tensor], Tensor], fused._apply_gate)  # of the outputs of both, joined
    if not separate:
        return lambda linear, inputs: gate(linear(GATE_UP, inputs))
    return lambda linear, inputs: gate(torch.cat([linear(GATE, inputs), linear(UP, inputs)], dim=-1))


def take(rows: Tensor, index: Tensor, back: Tensor, gaps: bool = False, back_gaps: bool = False) -> Tensor:
    """Gather rows, (n, features), by their index, int64 (m,).

    Args:
        rows: (n, features).
        index: the row of each result; -1: zeros.
        back: int64 (n, r), the results that took each row; -1: none. The gradient is summed over them, in this order.
        gaps: some of `index` is -1.
        back_gaps: some of `back` is -1.
    """
    result: Tensor = _Take.apply(rows, index, back, gaps, back_gaps)  # type: ignore[no-untyped-call]  # PyTorch's
    return result


class _Take(torch.autograd.Function):
    """`take`, whose backward pass gathers as well: PyTorch's own would add up rows one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, gaps: bool, back_gaps: bool) -> Tensor:
        ctx.save_for_backward(back)
        ctx.back_gaps = back_gaps
        return _gather(rows, index, gaps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        taken = _gather(gradients[0], back.flatten(), ctx.back_gaps)
        return taken.view(*back.shape, -1).sum(1), None, None, None, None


def _gather(rows: Tensor, index: Tensor, gaps: bool) -> Tensor:
    """Rows by index; zeros where it is -1, if there are such `gaps`."""
    if not gaps:
        return rows[index]
    return rows[index.clamp_min(0)].masked_fill_((index < 0).unsqueeze(1), 0)
