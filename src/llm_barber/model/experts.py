"""Mixtures of experts: transformers keeps a layer's experts in 3-D parameters; here each expert has linears of its own.

Most checkpoints know experts one by one, and so does pruning: each is pruned from the tokens that are routed to it.
What an expert's linears are given is padded with zeros to as many rows for every sequence, so that the hooks of
`block.py` find sequences in it, and that an expert which no token goes to is called, too; zeros add nothing to any
statistic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError

GATE_UP, GATE, UP, DOWN, BIAS = "gate_up_proj", "gate_proj", "up_proj", "down_proj", "_bias"


@dataclass(frozen=True)
class Part:
    """What an expert's parameter is of a stacked one: rows (from, to) of (out, in), maybe kept `turned`."""

    name: str
    expert: int
    rows: tuple[int, int | None] = (0, None)
    turned: bool = False

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the expert's part of a tensor, (experts, …)."""
        own = stacked[self.expert]
        return (own.t() if self.turned else own)[slice(*self.rows)]


class Experts(nn.ModuleList):
    """The experts of a layer, each a module with linears, in place of a module with 3-D parameters.

    These are `gate_up_proj`, (experts, 2 · inner, hidden), and `down_proj`, (experts, hidden, inner). Where gates come
    first, an expert has `gate_proj`, `up_proj` and `down_proj`; where they stand otherwise, or with biases,
    `gate_up_proj` and `down_proj`; without gates, `up_proj` and `down_proj`.

    `sequences`: how many the tokens of the next call belong to, whole ones one after the other. `tokens`: how many each
    expert was given since the layer was loaded, int64 (experts,).
    """

    combine: Callable[[nn.Module, Tensor], Tensor]

    def __init__(self, fused: nn.Module) -> None:
        self.turned = bool(getattr(fused, "is_transposed", False))
        self.first = UP if UP in fused._parameters else GATE_UP
        first, down = fused.get_parameter(self.first), fused.get_parameter(DOWN)
        hidden, inner = down.shape[1:] if not self.turned else down.shape[:0:-1]
        rows = first.shape[2 if self.turned else 1]
        bias = f"{DOWN}{BIAS}" in fused._parameters
        self.separate = self.first == GATE_UP and not self.turned and not bias
        shapes = {self.first: (rows, hidden), DOWN: (hidden, inner)}
        if self.separate:
            shapes = {GATE: (inner, hidden), UP: (inner, hidden), DOWN: (hidden, inner)}
        super().__init__(_expert(shapes, bias, first) for _ in range(len(down)))
        self.inner = inner
        self.biased = bias
        # As a submodule it would be one more expert.
        self.__dict__["combine"] = _combine(fused, self.first == GATE_UP, self.separate)
        self.sequences = 1
        self.tokens = torch.zeros(len(down), dtype=torch.int64, device="cpu")  # the rest may be on meta
        self._routes: tuple[Tensor, Tensor] | None = None
        self._same_routes = False

    def parts(self, parameter: str) -> list[Part]:
        """The experts' parameters, by names here, that a stacked parameter of transformers' module holds."""
        linear, bias = parameter.removesuffix(BIAS), parameter.endswith(BIAS)
        leaf, turned = "bias" if bias else "weight", self.turned and not bias
        rows: dict[str, tuple[int, int | None]] = {linear: (0, None)}
        if self.separate and linear == GATE_UP:
            rows = {GATE: (0, self.inner), UP: (self.inner, None)}
        return [
            Part(f"{number}.{name}.{leaf}", number, own, turned)
            for number in range(len(self))
            for name, own in rows.items()
        ]

    @contextmanager
    def same_routes(self) -> Iterator[None]:
        """Route as in the call before, whatever the router says: two models' experts are given the same tokens."""
        self._same_routes = True
        try:
            yield
        finally:
            self._same_routes = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden) from (tokens, hidden), and for each token its experts and their weights, (tokens, k)."""
        if self._same_routes and self._routes is not None:
            top_k_index, top_k_weights = self._routes
        self._routes = (top_k_index, top_k_weights)
        count, chosen = top_k_index.shape
        routed = top_k_index.flatten()
        order = routed.argsort(stable=True)  # by expert, then by token, and so by sequence
        token = order // chosen
        sequence = token // (count // self.sequences)
        group = routed[order] * self.sequences + sequence
        every = torch.arange(len(self) * self.sequences, device=group.device)
        first, after = (torch.searchsorted(group, every, right=right) for right in (False, True))
        sizes = (after - first).view(len(self), self.sequences)
        # Of each expert the sequences get as much room as the one with the most tokens needs.
        room = sizes.amax(1).clamp_min(1)
        slot = sequence * room[routed[order]] + torch.arange(len(order), device=group.device) - first[group]
        given, rooms = torch.stack([sizes.sum(1), room]).tolist()  # the only wait for the device
        self.tokens += torch.tensor(given, device="cpu")
        outputs, start = [], 0
        for number, expert in enumerate(self):
            own = slice(start, start + given[number])
            start = own.stop
            inputs = hidden_states.new_zeros(self.sequences * rooms[number], hidden_states.shape[1])
            inputs = inputs.index_copy(0, slot[own], hidden_states[token[own]])
            inner = self.combine(expert, inputs)
            if self.biased:  # what biases make of the padding is nobody's input
                inner = torch.zeros_like(inner).index_copy(0, slot[own], inner[slot[own]])
            outputs.append(expert.get_submodule(DOWN)(inner)[slot[own]])
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(count, chosen, -1).sum(1).to(hidden_states.dtype)


def split_experts(model: nn.Module) -> None:
    """Give every mixture of experts in a model linears of its own.

    Raises:
        ModelError: experts that do more than this module knows.
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
    """Are these experts in 3-D parameters, (experts, out, in) or (experts, in, out)?"""
    down, first = (module._parameters.get(name) for name in (DOWN, GATE_UP if GATE_UP in module._parameters else UP))
    return down is not None and first is not None and down.dim() == first.dim() == 3


class _Linear(nn.Linear):
    """Without first values: it is given others."""

    def reset_parameters(self) -> None:
        """Leave them as they are."""


def _expert(shapes: dict[str, tuple[int, int]], bias: bool, like: Tensor) -> nn.Module:
    """A module with linears of these shapes, (out, in)."""
    return nn.ModuleDict(
        {
            name: _Linear(columns, rows, bias=bias, dtype=like.dtype, device=like.device)
            for name, (rows, columns) in shapes.items()
        }
    )


def _combine(fused: nn.Module, gated: bool, separate: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """From an expert and its inputs to the inputs of its down projection, as transformers' module does it."""
    if not gated:
        activation = cast(Callable[[Tensor], Tensor], fused.act_fn)
        return lambda expert, inputs: activation(expert.get_submodule(UP)(inputs))
    gate = cast(Callable[[Tensor], Tensor], fused._apply_gate)  # of what both together give
    if not separate:
        return lambda expert, inputs: gate(expert.get_submodule(GATE_UP)(inputs))
    return lambda expert, inputs: gate(
        torch.cat([expert.get_submodule(GATE)(inputs), expert.get_submodule(UP)(inputs)], dim=-1)
    )
