"""Spread a budget of weights to prune over linears, so that what goes costs the model's loss least.

Taking weight W away changes the loss by about ½ W² · F, with F the Fisher information of the weight: the sum over
tokens of its squared gradient (g x)², g the gradient of the loss by the linear's output and x its input (optimal brain
damage, LeCun et al., 1989). F is taken as separable here, rows times columns: that changes sparsities by a few
thousandths. Every row of a linear loses as many weights as the others, those that cost least, so that the n-th costs no
less than the one before: taking the cheapest next one of all linears until the budget is spent is the least sum (of the
last linear, some rows lose one weight more than the others). The sparsities used lie between that and the same for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_barber.masking.selection import sort_values


def removal_costs(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What the first, second, … weight to go costs, mean over the rows, float32 (in,), ascending.

    Args:
        weight: (out, in).
        rows: float32 (out,), the Fisher information's sums over inputs.
        columns: float32 (in,), its sums over outputs.
    """
    total = columns.sum().clamp_min(torch.finfo(torch.float32).tiny)
    half_curvature = torch.outer(rows / (2 * total), columns)
    return sort_values(half_curvature.mul_(weight.float().square())).mean(0)


def spread_budget(
    costs: Sequence[Tensor], rows: Sequence[int], sparsity: float, share: float | None = None
) -> list[float]:
    """The sparsity of each linear.

    Args:
        costs: of each linear, (in,), ascending; see `removal_costs`.
        rows: of each linear.
        sparsity: of all together; whole weights miss it by less than one, where not every row is down to its last one.
        share: of the way from the same sparsity for all, 0, to what costs least, 1. None: as much as the sparsity; the
            prices are rough, and this was found to do well (docs/method/tuning.md).
    """
    share = sparsity if share is None else share
    sizes = [len(cost) * count for cost, count in zip(costs, rows, strict=True)]
    limits = [size - count for size, count in zip(sizes, rows, strict=True)]
    found = []
    left = 0.0  # weights that rounding to whole ones, or a limit, owes to the next linear
    for least, size, limit in zip(cheapest(costs, rows, sparsity), sizes, limits, strict=True):
        wanted = (sparsity + share * (least - sparsity)) * size + left
        found.append(min(round(wanted), limit))
        left = wanted - found[-1]
    for place, limit in reversed(list(enumerate(limits))):  # what the last ones have no room for
        more = min(round(left), limit - found[place])
        found[place] += more
        left -= more
    return [weights / size for weights, size in zip(found, sizes, strict=True)]


def cheapest(costs: Sequence[Tensor], rows: Sequence[int], sparsity: float) -> list[float]:
    """The sparsities that cost least; no linear loses all weights of a row."""
    columns = [len(one) for one in costs]
    budget = round(sparsity * sum(r * c for r, c in zip(rows, columns, strict=True)))
    choices = torch.cat([one[:-1].cpu() for one in costs])
    owners = torch.repeat_interleave(torch.arange(len(costs)), torch.tensor([count - 1 for count in columns]))
    order = choices.argsort(stable=True)
    owners = owners[order]
    spent = torch.tensor(rows)[owners].cumsum(0)
    whole = int((spent <= budget).sum())
    taken: list[float] = torch.bincount(owners[:whole], minlength=len(rows)).tolist()
    if whole < len(owners):  # the next one, of some rows
        last = int(owners[whole])
        taken[last] += (budget - (int(spent[whole - 1]) if whole else 0)) / rows[last]
    return [number / count for number, count in zip(taken, columns, strict=True)]
