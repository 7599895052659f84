"""Spread a budget of weights to prune over linears, so that what goes costs the model's loss least.

Taking weight W away changes the loss by about ½ W² · F, with F the Fisher information of the weight: the sum over
tokens of its squared gradient (g x)², g the gradient of the loss by the linear's output and x its input (optimal brain
damage, LeCun et al., 1989). F is taken as separable here, rows times columns: that changes sparsities by a few
thousandths. Every row of a linear loses as many weights as the others, those that cost least, so that the n-th costs no
less than the one before: taking the cheapest next one of all linears until the budget is spent is the least sum. The
sparsities used lie between that and the same for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-6  # of a column: what sums of floating-point numbers may miss


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


def spread_budget(
    costs: Sequence[Tensor], rows: Sequence[int], sparsity: float, share: float | None = None
) -> list[float]:
    """The sparsity of each linear.

    Args:
        costs: of each linear, (in,), ascending; see `removal_costs`.
        rows: of each linear.
        sparsity: of all together, not passed, and missed by less than one weight of every row of one linear.
        share: of the way from the same sparsity for all, 0, to what costs least, 1. None: as much as the sparsity; the
            prices are rough, and this was found to do well (docs/refining.md).
    """
    share = sparsity if share is None else share
    found = []
    left = 0.0  # weights that rounding to whole columns owes to the next linear
    for cost, count, least in zip(costs, rows, cheapest(costs, rows, sparsity), strict=True):
        wanted = (sparsity + share * (least - sparsity)) * len(cost) * count + left
        columns = min(int(wanted / count + ROUNDING), len(cost) - 1)
        left = wanted - columns * count
        found.append(columns / len(cost))
    return found


def cheapest(costs: Sequence[Tensor], rows: Sequence[int], sparsity: float) -> list[float]:
    """The sparsities that cost least; no linear loses all weights of a row.

    The sparsity of all together is not passed, and missed by less than one weight of every row of one linear.
    """
    columns = [len(one) for one in costs]
    budget = int(sparsity * sum(r * c for r, c in zip(rows, columns, strict=True)))
    choices = torch.cat([one[:-1].cpu() for one in costs])
    owners = torch.repeat_interleave(torch.arange(len(costs)), torch.tensor([count - 1 for count in columns]))
    order = choices.argsort(stable=True)
    spent = torch.tensor(rows)[owners[order]].cumsum(0)
    taken = torch.bincount(owners[order][spent <= budget], minlength=len(rows)).tolist()
    return [number / count for number, count in zip(taken, columns, strict=True)]
