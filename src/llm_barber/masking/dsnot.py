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
        input_variance: float32, (in,), see `statistics.InputMoments`.
        pattern: N:M to keep up, if any.
        cycles: most swaps a row.
        threshold: a row is left alone once its expected error is at most this (summed over a sequence's tokens).

    Returns:
        bool, (out, in), with as many True a row as `keep`.
    """
    contribution = weight.float() * input_sums
    # A constant input has no variance: what grows there takes its share of the error away for certain.
    growth = contribution / input_variance.clamp_min(torch.finfo(torch.float32).tiny)
    keep = keep.clone()
    rows = torch.arange(len(keep), device=keep.device)
    error = (contribution * ~keep).sum(1)
    first_sign = error.sign()
    active = error.abs() > threshold
    # Swaps change no other weight's rank: each row walks down its lists, one for either sign of its error.
    growing_lists = _lists(growth, -growth, ~keep, ~keep, cycles)
    going_lists = _lists(-wanda_score, -wanda_score, keep & (contribution < 0), keep & (contribution > 0), cycles)
    score_kept = wanda_score.masked_fill(~keep, torch.inf)
    steps = torch.zeros(2, len(keep), dtype=torch.long, device=keep.device)
    for _ in range(cycles):
        side = (error <= 0).long()
        step = steps[side, rows]
        growing = growing_lists[side, rows, step]
        if pattern is None:
            going = going_lists[side, rows, step.clamp_max(going_lists.shape[2] - 1)]
        else:
            group = growing.clamp_min(0) // pattern.of * pattern.of
            places = group.unsqueeze(1) + torch.arange(pattern.of, device=keep.device)
            score, place = score_kept.gather(1, places).min(1)
            going = torch.where(score < torch.inf, places[rows, place], -1)
        active &= (growing >= 0) & (going >= 0)
        growing, going = growing.clamp_min(0), going.clamp_min(0)
        after = error + contribution[rows, going] - contribution[rows, growing]
        active &= ~keep[rows, growing]  # the other list came first: the row has nothing left to grow
        if pattern is not None:
            active &= after.sign() == first_sign
        if not active.any():
            break
        moved = rows[active]
        keep[moved, growing[active]] = True
        keep[moved, going[active]] = False
        score_kept[moved, going[active]] = torch.inf
        steps[side, rows] += active
        error = torch.where(active, after, error)
        active &= error.abs() > threshold
    return keep


def _lists(first: Tensor, second: Tensor, first_mask: Tensor, second_mask: Tensor, length: int) -> Tensor:
    """The columns with the highest scores of each row, highest first, -1 after the last; (2, rows, length)."""
    length = min(length, first.shape[1])
    found = []
    for scores, mask in ((first, first_mask), (second, second_mask)):
        values, columns = scores.masked_fill(~mask, -torch.inf).topk(length, dim=1)
        found.append(columns.masked_fill_(values == -torch.inf, -1))
    return torch.stack(found)
