"""Mixtures of experts: transformers keeps a layer's experts in 3-D parameters; here each expert has linears of its own.

Checkpoints know experts one by one, and so does pruning: each is pruned from the tokens that are routed to it. What an
expert's linears are given is padded with zeros to as many rows for every sequence, so that the hooks of `block.py`
find sequences in it, and that an expert which no token goes to is called, too; zeros add nothing to any statistic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """A gated MLP; `forward` is the mixture's."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype, device=device)


class Experts(nn.ModuleList):
    """The experts of a layer, in place of a module with two parameters.

    These are `gate_up_proj`, (experts, 2 · inner, hidden), gates first, and `down_proj`, (experts, hidden, inner).

    `sequences`: how many the tokens of the next call belong to, whole ones one after the other. `tokens`: how many each
    expert was given since the layer was loaded, int64 (experts,).
    """

    activation: Callable[[Tensor], Tensor]

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        count, hidden, inner = down.shape
        super().__init__(Expert(hidden, inner, gate_up.dtype, gate_up.device) for _ in range(count))
        # As a submodule it would be one more expert.
        self.__dict__["activation"] = cast(Callable[[Tensor], Tensor], fused.act_fn)
        self.sequences = 1
        self.tokens = torch.zeros(count, dtype=torch.int64, device="cpu")  # the rest may be on meta
        self._routes: tuple[Tensor, Tensor] | None = None
        self._same_routes = False

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
        length = count // self.sequences
        routed = top_k_index.flatten()
        self.tokens += torch.bincount(routed, minlength=len(self)).cpu()
        outputs, places = [], []
        for number, expert in enumerate(self):
            place = (routed == number).nonzero().flatten()  # by token, and so by sequence
            token = place // chosen
            sequence = token // length
            sizes = torch.bincount(sequence, minlength=self.sequences)
            capacity = max(1, int(sizes.max()))
            first = sizes.cumsum(0) - sizes
            slot = sequence * capacity + torch.arange(len(place), device=place.device) - first[sequence]
            inputs = hidden_states.new_zeros(self.sequences * capacity, hidden_states.shape[1])
            inputs = inputs.index_copy(0, slot, hidden_states[token])
            assert isinstance(expert, Expert)
            inner = self.activation(expert.gate_proj(inputs)) * expert.up_proj(inputs)
            outputs.append(expert.down_proj(inner)[slot])
            places.append(place)
        order = torch.cat(places)
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(count, chosen, -1).sum(1).to(hidden_states.dtype)


def split_experts(model: nn.Module) -> None:
    """Give every mixture of experts in a model linears of its own."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_fused(child):
                setattr(module, name, Experts(child))


def is_fused(module: nn.Module) -> bool:
    """Are these experts in 3-D parameters, (out, in) each, gates before the others, without biases?"""
    gate_up = module._parameters.get("gate_up_proj")
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    return gate_up is not None and gate_up.dim() == 3 and "down_proj" in module._parameters and plain
