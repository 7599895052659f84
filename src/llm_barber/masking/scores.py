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
    if pattern is None:
        ordered = scores.sort(1).values
        pruned = (~keep).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
        border = (ordered.gather(1, pruned) + ordered.gather(1, (pruned - 1).clamp(min=0))) / 2
    else:
        ordered = by_pattern_group(scores, pattern).sort(-1).values
        place = pattern.of - pattern.kept
        border = torch.zeros_like(scores)
        by_pattern_group(border, pattern).copy_(ordered[..., place - 1 : place + 1].mean(-1, keepdim=True))
    beyond = scores - border
    up = torch.maximum(scores, border) + AHEAD / (1 - beyond.clamp(max=0))
    down = torch.minimum(scores, border) - AHEAD / (1 + beyond.clamp(min=0))
    scores = torch.where(keep, up, down)
    return scores if fixed is None else scores.masked_fill(fixed & keep, torch.inf)


def mask_of(scores: Tensor, pruned: Tensor, pattern: NofM | None) -> Tensor:
    """The mask that scores give: the lowest go, equal ones from the left.

    Args:
        scores: float32, (out, in).
        pruned: how many go of each row, int64 (out,); not for N:M.
        pattern: N:M, if the mask has one; the tail of its rows is kept.

    Returns:
        bool, (out, in), True survives.
    """
    if pattern is None:
        return ~lowest(scores, pruned)
    keep = torch.ones_like(scores, dtype=torch.bool)
    ranks = rank_within(by_pattern_group(scores, pattern))
    by_pattern_group(keep, pattern).copy_(ranks >= pattern.of - pattern.kept)
    return keep
