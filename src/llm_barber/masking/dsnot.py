"""DSnoT (arXiv 2310.08915): grow and drop weights of a given mask so that the expected output of each row is kept.

A row's expected error is the sum of W · E[x] over its pruned weights. Each cycle grows the pruned weight that takes
the most of it away, relative to the variance of its input, and drops the kept weight with the lowest Wanda score among
those that take some of it away too; with N:M, the lowest of the grown weight's group, whatever its
sign.
"""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM


def dsnot(
    keep: Tensor,
    weight: Tensor,
    wanda_score: Tensor,
    input_sums: Tensor,
    input_variance: Tensor,
    pattern: NofM | None = None,
    cycles: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Fine-tune the mask of one linear without training.

    Args:
        keep: bool, (out, in), the initial mask.
        weight: (out, in).
        wanda_score: float32, (out, in), see `saliency.wanda`.
        input_sums: float32, (in,), mean over sequences of the sum over tokens of each input channel.
        input_variance: float32, (in,), over all tokens.
        pattern: N:M to keep up, if any.
        cycles: most swaps a row.
        threshold: a row is left alone once its expected error is at most this (summed over a sequence's tokens).

    Returns:
        bool, (out, in), with as many True a row as `keep`.
    """
    contribution = weight.float() * input_sums
    # A constant input has no variance: what grows there takes its share of the error away for certain.
    growth = contribution / input_variance.clamp_min(torch.finfo(torch.float32).tiny)
    never = torch.inf
    keep = keep.clone()
    can_grow, can_drop = ~keep, keep.clone()
    rows = torch.arange(len(keep), device=keep.device)
    error = (contribution * can_grow).sum(1)
    first_sign = error.sign()
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        sign = torch.where(error > 0, 1.0, -1.0)
        growing = (growth * sign.unsqueeze(1)).masked_fill(~can_grow, -never).argmax(1)
        if pattern is None:
            opposed = contribution * sign.unsqueeze(1) < 0
            droppable = can_drop & opposed
        else:
            group = torch.arange(keep.shape[1], device=keep.device) // pattern.of
            droppable = can_drop & (group == group[growing].unsqueeze(1))
        dropping = wanda_score.masked_fill(~droppable, never).argmin(1)
        active &= (error.abs() > threshold) & can_grow[rows, growing] & droppable[rows, dropping]
        after = error + contribution[rows, dropping] - contribution[rows, growing]
        if pattern is not None:
            active &= after.sign() == first_sign
        if not active.any():
            break
        keep[rows, growing] |= active
        keep[rows, dropping] &= ~active
        can_grow[rows, growing] = False
        can_drop[rows, dropping] = False
        error = torch.where(active, after, error)
    return keep
