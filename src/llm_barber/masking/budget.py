"""Spread a budget of weights to prune over linears, so that what goes costs the model's loss least.

Taking weight W away changes the loss by about ½ W² · F, with F the Fisher information of the weight: the sum over
tokens of its squared gradient (g x)², g the gradient of the loss by the linear's output and x its input (optimal brain
damage, LeCun et al., 1989). F is taken as separable here, rows times columns: that changes sparsities by a few
thousandths. Every row of a linear loses as many weights as the others, those that cost least, so that the n-th costs no
less than the one before: taking the cheapest next one of all linears until the budget is spent is the least sum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPREAD = 0.15  # a linear's sparsity is at most so far from the one asked for


def removal_costs(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What the first, second, … weight to go costs, mean over the rows, float32 (in,), ascending.

    Args:
        weight: (out, in).
        rows: float32 (out,), the Fisher information's sums over inputs.
        columns: float32 (in,), its sums over outputs.
    """
    total = columns.sum().clamp_min(torch.finfo(torch.float32).tiny)
    half_curvature = torch.outer(rows / (2 * total), columns)
    return half_curvature.mul_(weight.float().square()).sort(1).values.mean(0)


def spread_budget(costs: Sequence[Tensor], rows: Sequence[int], sparsity: float, spread: float = SPREAD) -> list[float]:
    """The sparsity of each linear.

    Args:
        costs: of each linear, (in,), ascending; see `removal_costs`.
        rows: of each linear.
        sparsity: of all together, not passed, and missed by less than one weight of every row of one linear.
        spread: no linear's sparsity is further from it, and none loses all weights of a row.
    """
    columns = [len(one) for one in costs]
    least = [max(1, math.ceil((sparsity - spread) * count)) for count in columns]
    most = [min(count - 1, math.floor((sparsity + spread) * count)) for count in columns]
    budget = math.floor(sparsity * sum(r * c for r, c in zip(rows, columns, strict=True)))
    budget -= sum(r * low for r, low in zip(rows, least, strict=True))
    choices = torch.cat([one[low:high].cpu() for one, low, high in zip(costs, least, most, strict=True)])
    owners = torch.cat(
        [torch.full((max(0, high - low),), index) for index, (low, high) in enumerate(zip(least, most, strict=True))]
    )
    order = choices.argsort(stable=True)
    spent = torch.tensor(rows)[owners[order]].cumsum(0)
    taken = torch.bincount(owners[order][spent <= budget], minlength=len(rows)).tolist()
    return [(low + more) / count for low, more, count in zip(least, taken, columns, strict=True)]
