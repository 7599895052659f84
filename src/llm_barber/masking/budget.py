"""Spread a budget of weights to prune over linears, so that pruning costs the model's loss least.

Pruning a weight W changes the loss by about ½ W² · F. F is the weight's Fisher information: the sum over tokens of its
squared gradient (g x)², with g the gradient of the loss by the linear's output and x its input (optimal brain damage,
LeCun et al., 1989). F is taken as separable, rows times columns: that changes sparsities by a few thousandths.

Every row of a linear loses equally many weights, its cheapest ones first, so that each weight costs no less than the
one before it. Taking the cheapest next weight of all linears until the budget is spent therefore gives the least sum.
(In the last linear, some rows lose one weight more than the rest.) The result lies between these cheapest sparsities
and the same sparsity for every linear.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_barber.masking.selection import sort_values


def removal_costs(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cost of the first, second, … weight that a row loses, float32 (in,), ascending; mean over the rows.

    Args:
        weight: (out, in).
        rows: float32 (out,), the Fisher information summed over inputs.
        columns: float32 (in,), the Fisher information summed over outputs.
    """
    total = columns.sum().clamp_min(torch.finfo(torch.float32).tiny)
    half_curvature = torch.outer(rows / (2 * total), columns)
    return sort_values(half_curvature.mul_(weight.float().square())).mean(0)


def spread_budget(
    costs: Sequence[Tensor], rows: Sequence[int], sparsity: float, share: float | None = None
) -> list[float]:
    """Sparsity of each linear.

    Args:
        costs: a tensor (in,) per linear, ascending; see `removal_costs`.
        rows: the number of rows of each linear.
        sparsity: the sparsity of all linears together. Whole weights miss it by less than one weight, unless every
            row is down to its last weight.
        share: how far to go from the same sparsity for every linear (0) to the cheapest sparsities (1). None: the
            value of `sparsity`, since the costs are rough and this value did well (docs/method/tuning.md).
    """
    share = sparsity if share is None else share
    sizes = [len(cost) * count for cost, count in zip(costs, rows, strict=True)]
    limits = [size - count for size, count in zip(sizes, rows, strict=True)]
    pruned = []
    owed = 0.0  # weights that rounding, or a limit, passes on to the next linear
    for cheapest, size, limit in zip(cheapest_sparsities(costs, rows, sparsity), sizes, limits, strict=True):
        target = (sparsity + share * (cheapest - sparsity)) * size + owed
        pruned.append(min(round(target), limit))
        owed = target - pruned[-1]
    for index, limit in reversed(list(enumerate(limits))):  # earlier linears take what the last ones have no room for
        more = min(round(owed), limit - pruned[index])
        pruned[index] += more
        owed -= more
    return [count / size for count, size in zip(pruned, sizes, strict=True)]


def cheapest_sparsities(costs: Sequence[Tensor], rows: Sequence[int], sparsity: float) -> list[float]:
    """Sparsity of each linear with the least total cost; each row keeps a weight."""
    columns = [len(cost) for cost in costs]
    budget = round(sparsity * sum(r * c for r, c in zip(rows, columns, strict=True)))
    choices = torch.cat([cost[:-1].cpu() for cost in costs])
    linears = torch.repeat_interleave(torch.arange(len(costs)), torch.tensor([count - 1 for count in columns]))
    linears = linears[choices.argsort(stable=True)]
    spent = torch.tensor(rows)[linears].cumsum(0)
    whole = int((spent <= budget).sum())
    pruned_per_row: list[float] = torch.bincount(linears[:whole], minlength=len(rows)).tolist()
    if whole < len(linears):  # the rest of the budget is one weight of some rows of the next linear
        last = int(linears[whole])
        pruned_per_row[last] += (budget - (int(spent[whole - 1]) if whole else 0)) / rows[last]
    return [pruned / count for pruned, count in zip(pruned_per_row, columns, strict=True)]
