"""DSnoT (arXiv 2310.08915): grow and drop weights so that the expected output of each row is kept.

The expected error of a row is the sum of W · E[x] over its pruned weights. Each cycle grows the pruned weight that
lowers the error most, relative to the variance of its input. It drops the kept weight with the lowest Wanda score among
those that lower the error, too; with N:M, among those of the grown weight's group, whatever their sign.
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
        pattern: the mask's N:M, which stays, if it has one.
        cycles: maximal number of swaps in a row.
        threshold: a row with an expected error of at most this (summed over a sequence's tokens) is left alone.

    Returns:
        bool, (out, in), with as many True in each row as `keep`.
    """
    contribution = weight.float() * input_sums
    keep = keep.clone()
    rows = torch.arange(len(keep), device=keep.device)
    error = (contribution * ~keep).sum(1)
    first_sign = error.sign()
    active = error.abs() > threshold
    # A swap does not change how the other weights rank: each row walks down its lists, one for each sign of its error.
    grow_lists = _grow_lists(contribution, input_variance, keep, cycles)
    drop_lists = _drop_lists(contribution, wanda_score, keep, cycles)
    score_kept = wanda_score.masked_fill(~keep, torch.inf)
    steps = torch.zeros(2, len(keep), dtype=torch.long, device=keep.device)
    for _ in range(cycles):
        side = (error <= 0).long()
        step = steps[side, rows]
        grow = grow_lists[side, rows, step]
        if pattern is None:
            drop = drop_lists[side, rows, step.clamp_max(drop_lists.shape[2] - 1)]
        else:
            drop = _lowest_of_group(score_kept, grow, pattern)
        active &= (grow >= 0) & (drop >= 0)
        grow, drop = grow.clamp_min(0), drop.clamp_min(0)
        new_error = error + contribution[rows, drop] - contribution[rows, grow]
        active &= ~keep[rows, grow]  # the other list has grown this weight: the row has nothing left to grow
        if pattern is not None:
            active &= new_error.sign() == first_sign
        if not active.any():
            break
        swapped = rows[active]
        keep[swapped, grow[active]] = True
        keep[swapped, drop[active]] = False
        score_kept[swapped, drop[active]] = torch.inf
        steps[side, rows] += active
        error = torch.where(active, new_error, error)
        active &= error.abs() > threshold
    return keep


def _grow_lists(contribution: Tensor, input_variance: Tensor, keep: Tensor, length: int) -> Tensor:
    """Columns to grow in each row, best first, for positive and negative errors; int64 (2, rows, length)."""
    # A weight of a constant input has no variance: growing it lowers the error with certainty.
    growth = contribution / input_variance.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([_ranked_columns(scores, ~keep, length) for scores in (growth, -growth)])


def _drop_lists(contribution: Tensor, wanda_score: Tensor, keep: Tensor, length: int) -> Tensor:
    """Columns to drop in each row, best first, for positive and negative errors; int64 (2, rows, length)."""
    masks = (keep & (contribution < 0), keep & (contribution > 0))
    return torch.stack([_ranked_columns(-wanda_score, mask, length) for mask in masks])


def _ranked_columns(scores: Tensor, mask: Tensor, length: int) -> Tensor:
    """Columns of each row where `mask`, highest score first, −1 after the last; int64 (rows, length)."""
    values, columns = scores.masked_fill(~mask, -torch.inf).topk(min(length, scores.shape[1]), dim=1)
    return columns.masked_fill_(values == -torch.inf, -1)


def _lowest_of_group(scores: Tensor, columns: Tensor, pattern: NofM) -> Tensor:
    """Column with the lowest score in each column's group of M, −1 if all are infinite; int64 (rows,)."""
    first = columns.clamp_min(0) // pattern.of * pattern.of
    members = first.unsqueeze(1) + torch.arange(pattern.of, device=scores.device)
    score, position = scores.gather(1, members).min(1)
    return torch.where(score < torch.inf, first + position, -1)
