"""Mixtures of experts: give each expert its own linears, in place of transformers' 3-D parameters.

Most checkpoints store experts one by one, and each expert is pruned from the tokens that are routed to it. Experts are
computed one by one or together (`expert_products.py`). What listens to them gets the inputs and outputs of experts by
sequence: padded with zeros to the same number of rows for every sequence, of an expert without tokens, too. Zeros add
nothing to any statistic.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_barber.errors import ModelError
from llm_barber.model.expert_products import choose_products, lay_out, multiply
from llm_barber.model.routes import Bucket, Routes, SequenceView

GATE_UP, GATE, UP, DOWN, BIAS = "gate_up_proj", "gate_proj", "up_proj", "down_proj", "_bias"


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


# Takes a linear's name inside an expert; its inputs, (rows, in), of one or more experts; its output, (rows, out), None
# before it is computed; and the view of such rows by expert and sequence. Returns what the experts go on with instead
# of the output, or None.
Listener = Callable[[str, Tensor, Tensor | None, SequenceView], Tensor | None]
Linear = Callable[[str, Tensor], Tensor]  # of a linear's name and its inputs


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
        self._shapes = list(shapes.values())
        self.biased = bias
        # Set as a submodule, it would be one more expert.
        self.__dict__["combine"] = _combine(fused, self.first_linear == GATE_UP, self.separate)
        self.sequences = 1
        self.tokens = torch.zeros(len(down), dtype=torch.int64, device="cpu")  # parameters may be on meta
        self._routes: tuple[Tensor, Tensor] | None = None
        self._same_routes = False
        self._listeners: OrderedDict[int, tuple[bool, Listener]] = OrderedDict()

    def listen(self, listener: Listener, before: bool) -> RemovableHandle:
        """Call a function `before` or after each call of linears.

        Hooks on the linears do not do: linears that are computed together are not called.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = before, listener
        return handle

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
        layout = lay_out(routes, choose_products(hidden_states, self._shapes))
        self.tokens = self.tokens.to(hidden_states.device) + routes.counts
        outputs = []
        for bucket, inputs, padding in zip(layout.buckets, layout.inputs(hidden_states), layout.padding, strict=True):
            linear = partial(self._linear, bucket, SequenceView(routes, layout, bucket, self.sequences))
            inner = self.combine(linear, inputs)
            if self.biased:  # biases have made the padding nonzero
                inner = inner.masked_fill(padding, 0)
            outputs.append(linear(DOWN, inner))
        weighted = layout.outputs(outputs) * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _linear(self, bucket: Bucket, view: SequenceView, name: str, inputs: Tensor) -> Tensor:
        """Outputs of a linear of a bucket's experts, (rows, out)."""
        linears = [cast(nn.Linear, self[expert].get_submodule(name)) for expert in bucket.experts]
        for before, listener in self._listeners.values():
            if before:
                listener(name, inputs, None, view)
        output = multiply(bucket, inputs, linears)
        for before, listener in self._listeners.values():
            if not before:
                heard = listener(name, inputs, output, view)
                output = output if heard is None else heard
        return output


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
