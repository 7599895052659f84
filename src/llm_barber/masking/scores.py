"""Scores that a mask follows from, so that a mask can be moved by gradients: the highest of each group are kept.

A step of gradient descent cannot change a mask, but it can change scores, and the mask with them. The gradient of a
loss by a score is taken to be that by the weight's presence: ∂L/∂w · W, with w the weight as it is computed with, W or
zero (straight-through: Bengio et al., arXiv 1308.3432). It says of a pruned weight what its coming back would do to the
loss, and of a kept one what its going would.
"""

import torch
from torch import Tensor

from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM
from llm_barber.masking.selection import lowest, rank_within

AHEAD = 0.01  # of a row's mean score: what kept weights are moved up by, and pruned ones down


def starting_scores(keep: Tensor, saliency: Tensor, pattern: NofM | None, fixed: Tensor | None = None) -> Tensor:
    """Scores that give a mask, each as near to a saliency as that allows.

    Weights that the saliency would have on the other side of the border, in their row or group of M, come to lie
    beside it, in its order.

    Args:
        keep: bool, (out, in), True survives.
        saliency: float32, (out, in), at least 0; any scale.
        pattern: the mask's N:M, if it has one; else rows compete within themselves.
        fixed: bool, (out, in), True where a kept weight stays.

    Returns:
        float32, (out, in); the mean of a row is about 1.
    """
    scores = saliency / saliency.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    stays = torch.zeros_like(keep) if fixed is None else fixed & keep
    ordered = _groups(scores.masked_fill(stays, torch.inf), pattern).sort(-1).values
    pruned = pruned_of(keep, pattern).unsqueeze(-1)
    last, first = (ordered.gather(-1, (pruned + one).clamp(0, ordered.shape[-1] - 1)) for one in (-1, 0))
    border = torch.zeros_like(scores)
    # Where nothing is left to go, what would be the first of the kept ones is infinite.
    _groups(border, pattern).copy_(torch.where(first.isfinite(), (last + first) / 2, last))
    beyond = scores - border
    up = torch.maximum(scores, border) + AHEAD / (1 - beyond.clamp(max=0))
    down = torch.minimum(scores, border) - AHEAD / (1 + beyond.clamp(min=0))
    return torch.where(keep, up, down).masked_fill(stays, torch.inf)


def pruned_of(keep: Tensor, pattern: NofM | None) -> Tensor:
    """How many go of each row, or group of M: int64 (out, groups), of a mask, bool (out, in).

    Not M - N everywhere: zeros of the dense model count as kept.
    """
    return (~_groups(keep, pattern)).sum(-1)


def _groups(tensor: Tensor, pattern: NofM | None) -> Tensor:
    """A view of (out, in) as (out, groups, members): whole rows, or whole groups of M."""
    return tensor.unsqueeze(1) if pattern is None else by_pattern_group(tensor, pattern)


def mask_of(scores: Tensor, keep: Tensor, pruned: Tensor, pattern: NofM | None) -> Tensor:
    """The mask that scores give: the lowest go, equal ones from the left.

    Args:
        scores: float32, (out, in).
        keep: bool, (out, in), the mask until now: N:M has no scores compete in the tail of its rows, which stays.
        pruned: how many go of each row or group of M, int64 (out, groups); see `pruned_of`.
        pattern: N:M, if the mask has one.

    Returns:
        bool, (out, in), True survives.
    """
    if pattern is None:
        return ~lowest(scores, pruned[:, 0])
    keep = keep.clone()
    ranks = rank_within(by_pattern_group(scores, pattern))
    by_pattern_group(keep, pattern).copy_(ranks >= pruned.unsqueeze(-1))
    return keep
