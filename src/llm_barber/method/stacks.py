"""Linears of experts, joined row after row, so that one operation takes the linears of all experts.

On a GPU the host takes longer to start an operation on one small expert than the GPU takes to compute it. Rows of a
mask, and of scores, do not depend on each other, so that a stack of linears gives each linear what it would get by
itself. On a CPU, where starting costs nothing and joining costs a copy, every linear is a stack of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.method.pruned_linear import PrunedLinear, fixed_weights
from llm_barber.model.experts import mixture_of

LARGE_WEIGHT = 2**24  # a GPU computes with so many elements for longer than the host takes to start an operation


@dataclass(frozen=True)
class Stack:
    """Linears of one shape and pattern, and their tensors joined along rows.

    `name`: for messages. `names`: of the n linears. `linear`: masks and values of all, (n · out, in).
    """

    name: str
    names: tuple[str, ...]
    linear: PrunedLinear

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Views (out, in) of a tensor (n · out, in), by linear."""
        if len(self.names) == 1:
            return {self.names[0]: tensor}
        return dict(zip(self.names, self.by_linear(tensor).unbind(0), strict=True))

    def join(self, by_linear: Mapping[str, Tensor]) -> Tensor:
        """Join tensors (out, in) of the linears, (n · out, in); zeros for a linear that is not named."""
        if len(self.names) == 1:
            return by_linear[self.names[0]]
        like = next(by_linear[name] for name in self.names if name in by_linear)
        return torch.cat([by_linear[name] if name in by_linear else torch.zeros_like(like) for name in self.names])

    def by_linear(self, tensor: Tensor) -> Tensor:
        """View a tensor (n · out, in) as (n, out, in)."""
        return tensor.view(len(self.names), -1, tensor.shape[1])

    def linears(self) -> dict[str, PrunedLinear]:
        """The linears by themselves, whose tensors are views."""
        if len(self.names) == 1:
            return {self.names[0]: self.linear}
        keep, weight, values = map(self.split, (self.linear.keep, self.linear.weight, self.linear.values))
        fixed = dict[str, Tensor]() if self.linear.fixed is None else self.split(self.linear.fixed)
        return {
            name: replace(self.linear, keep=keep[name], weight=weight[name], values=values[name], fixed=fixed.get(name))
            for name in self.names
        }


def stack_linears(linears: Mapping[str, PrunedLinear], experts: Iterable[str]) -> list[Stack]:
    """Stack linears of a mixture's experts; other linears are stacks of their own.

    Stacked linears have the same name in their expert (`down_proj`), the same shape and the same pattern.

    Args:
        linears: by name; stacks of several linears copy their tensors.
        experts: paths of mixtures of experts.
    """
    mixtures, alike = set(experts), dict[tuple[object, ...], list[str]]()
    for name, linear in linears.items():
        mixture, weight = mixture_of(name), linear.weight
        name_in_expert = name.rpartition(".")[2] if mixture in mixtures and is_stacked(weight) else name
        alike.setdefault((mixture, name_in_expert, weight.shape, linear.pattern), []).append(name)
    return [_stack(names, [linears[name] for name in names]) for names in alike.values()]


def is_stacked(weight: Tensor) -> bool:
    """Test whether an expert's weight is so small that a GPU is faster with the weights of all experts at once."""
    return weight.device.type != "cpu" and weight.numel() <= LARGE_WEIGHT


def _stack(names: list[str], linears: list[PrunedLinear]) -> Stack:
    if len(names) == 1:
        return Stack(names[0], (names[0],), linears[0])
    fixed = fixed_weights(linears)
    joined = replace(
        linears[0],
        keep=torch.cat([linear.keep for linear in linears]),
        weight=torch.cat([linear.weight for linear in linears]),
        values=torch.cat([linear.values for linear in linears]),
        fixed=None if fixed is None else torch.cat(fixed),
    )
    name_in_expert = names[0].rpartition(".")[2]
    return Stack(f"{mixture_of(names[0])}.*.{name_in_expert}", tuple(names), joined)
