"""Scores that define a mask, so that gradients can move it: the highest scores of each group are kept.

Gradient descent cannot change a mask, but it can change scores, and the mask with them. The gradient of a loss by a
score is taken to be its gradient by the weight's presence, ∂L/∂w · W, where w is W or zero, the weight that the forward
pass used (straight-through: Bengio et al., arXiv 1308.3432). For a pruned weight it estimates how growing it changes
the loss, for a kept weight how dropping it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM
from llm_barber.masking.selection import Runs, lowest_of_each, rank_within, sort_values

MARGIN = 0.01  # share of a row's mean score by which kept weights are moved up, and pruned weights down


def starting_scores(keep: Tensor, saliency: Tensor, pattern: NofM | None, fixed: Tensor | None = None) -> Tensor:
    """Scores that define a given mask and are as near to a saliency as the mask allows.

    The border of a row, or group of M, separates the scores of its pruned weights from those of its kept weights.
    A weight whose saliency lies on the wrong side gets a score just beside the border; such scores keep the order of
    their saliencies.

    Args:
        keep: bool, (out, in), True survives.
        saliency: float32, (out, in), at least 0; any scale.
        pattern: the mask's N:M, if it has one; otherwise the weights of a row compete.
        fixed: bool, (out, in), True where a kept weight has to stay.

    Returns:
        float32, (out, in), infinite where a kept weight is fixed; the mean of a row is about 1.
    """
    scores = saliency / saliency.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    stays = torch.zeros_like(keep) if fixed is None else fixed & keep
    groups = _groups(scores.masked_fill(stays, torch.inf), pattern)
    ordered = sort_values(groups[:, 0]).unsqueeze(1) if pattern is None else groups.sort(-1).values
    first_kept = count_pruned(keep, pattern).unsqueeze(-1)
    below, above = (ordered.gather(-1, index.clamp(0, ordered.shape[-1] - 1)) for index in (first_kept - 1, first_kept))
    border = torch.zeros_like(scores)
    # `above` is infinite if every weight that may be dropped is pruned.
    _groups(border, pattern).copy_(torch.where(above.isfinite(), (below + above) / 2, below))
    beyond = scores - border
    least = 4 * torch.finfo(torch.float32).eps * border  # so that the sum with a large border is another number
    up = torch.maximum(scores, border) + torch.maximum(MARGIN / (1 - beyond.clamp(max=0)), least)
    down = torch.minimum(scores, border) - torch.maximum(MARGIN / (1 + beyond.clamp(min=0)), least)
    return torch.where(keep, up, down).masked_fill(stays, torch.inf)


def count_pruned(keep: Tensor, pattern: NofM | None) -> Tensor:
    """Count the pruned weights of each row, or group of M, of a mask, (out, in): int64 (out, groups).

    With N:M it may be less than M − N, since zeros of the dense model count as kept.
    """
    return (~_groups(keep, pattern)).sum(-1)


def _groups(tensor: Tensor, pattern: NofM | None) -> Tensor:
    """View a tensor (out, in) as (out, groups, members): whole rows, or whole groups of M."""
    return tensor.unsqueeze(1) if pattern is None else by_pattern_group(tensor, pattern)


@dataclass(frozen=True)
class Scored:
    """A linear whose mask follows from scores.

    `scores`: float32, (out, in). `keep`: bool, (out, in), the previous mask; with N:M the tails of its rows stay as
    they are. `pruned`: number of weights to prune in each row or group of M, int64 (out, groups), as of `count_pruned`.
    `pattern`: the mask's N:M, if it has one. `runs`: `equal_runs` of the numbers to prune in each row; None: they are
    not known, or the mask is of N:M.
    """

    scores: Tensor
    keep: Tensor
    pruned: Tensor
    pattern: NofM | None
    runs: Runs | None = None


def masks_from_scores(linears: Sequence[Scored]) -> list[Tensor]:
    """Masks that scores define, bool (out, in), True survives, one for each linear.

    The lowest scores of each row or group of M are pruned, equal scores from the left. A GPU is waited for at most
    once, for ties in rows.
    """
    by_row = [linear for linear in linears if linear.pattern is None]
    counts, runs = [linear.pruned[:, 0] for linear in by_row], [linear.runs for linear in by_row]
    of_rows = iter(lowest_of_each([linear.scores for linear in by_row], counts, runs))
    return [~next(of_rows) if linear.pattern is None else _mask_of_groups(linear, linear.pattern) for linear in linears]


def _mask_of_groups(linear: Scored, pattern: NofM) -> Tensor:
    """Mask that scores define within the groups of M; the tails of rows stay as they are."""
    keep = linear.keep.clone()
    ranks = rank_within(by_pattern_group(linear.scores, pattern))
    by_pattern_group(keep, pattern).copy_(ranks >= linear.pruned.unsqueeze(-1))
    return keep
