"""Order channels so that N:M keeps more of their saliency.

N:M keeps the N weights with the highest saliency in each group of M neighbouring columns. Columns that are large in the
same rows compete if they share a group. Another order of the columns lets N:M keep more, and costs nothing where the
linears that compute these inputs can give them in that order. RIA (Zhang et al., ICLR 2024) and PermLLM (arXiv
2510.10136) reorder channels for the same reason, those of all linears, which takes a permutation at run time.
"""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM

ROWS = 768  # rows that decide, spread over the matrix: as many at least, and fewer than twice as many
TOGETHER = 256  # groups among which columns are assigned at once: the time grows with their cube
STEP = 8  # columns whose gains are computed at once
SEED = 0  # of the random numbers that choose the groups that are taken together


def order_channels(saliency: Tensor, pattern: NofM) -> Tensor:
    """Find an order of columns with which N:M keeps much saliency; in the rows that decide, never less than before.

    Columns are dealt into the groups by their sums, the largest first. Then, place by place, the columns that have this
    place in their groups are assigned to the groups anew, by an exact solution of the assignment problem
    (`scipy.optimize.linear_sum_assignment`): a column's gain in a group is its saliency beyond the N-th largest of the
    other columns there, summed over rows.

    Args:
        saliency: float32, (rows, columns), at least 0; columns are a multiple of M.
        pattern: N:M.

    Returns:
        int64, (columns,): place i takes the column that was at `order[i]`.
    """
    rows, columns = saliency.shape
    saliency = saliency[:: max(1, rows // ROWS)]
    groups = columns // pattern.of
    by_sum = saliency.sum(0).argsort(descending=True, stable=True)
    order = by_sum.view(pattern.of, groups).t().contiguous()
    generator = torch.Generator().manual_seed(SEED)
    for place in range(pattern.of):
        shuffled = torch.randperm(groups, generator=generator).to(order.device)
        for together in torch.split(shuffled, TOGETHER):
            order[together, place] = _assign(saliency, order[together], place, pattern.kept)
    present, assigned = torch.arange(columns, device=order.device), order.flatten()
    better = kept_saliency(saliency, assigned, pattern) > kept_saliency(saliency, present, pattern)
    return assigned if better else present


def kept_saliency(saliency: Tensor, order: Tensor, pattern: NofM) -> float:
    """Sum of the saliency, (rows, columns), that N:M keeps with an order of the columns, int64 (columns,)."""
    groups = saliency[:, order].view(len(saliency), -1, pattern.of)
    return float(groups.topk(pattern.kept).values.sum(dtype=torch.float64))


def _assign(saliency: Tensor, groups: Tensor, place: int, kept: int) -> Tensor:
    """Assign the columns that have one place in some groups to these groups anew: int64, (groups,).

    `groups`: the columns of each group, int64 (groups, M).
    """
    from scipy.optimize import linear_sum_assignment  # importing it takes a fifth of a second

    staying = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    border = saliency[:, staying].topk(kept).values[..., -1]  # (rows, groups): the N-th largest of those that stay
    moving = groups[:, place]
    # The sum over rows of max(saliency, border) is the gain and a number that depends on the group alone.
    gains = [
        torch.maximum(saliency[:, columns].t().unsqueeze(-1), border).sum(1) for columns in torch.split(moving, STEP)
    ]
    columns, places = linear_sum_assignment(torch.cat(gains).cpu().numpy(), maximize=True)
    assigned = torch.empty_like(moving)
    assigned[torch.from_numpy(places).to(moving.device)] = moving[torch.from_numpy(columns).to(moving.device)]
    return assigned
