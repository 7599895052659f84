"""Rebuild a mask: swap pruned weights that turned out salient with kept weights that did not.

arXiv 2408.10631. Within each comparison group, the pruned weights from high to low saliency are paired with the kept
weights from low to high. A pair is beneficial if its pruned weight has the higher saliency. The first
`floor(rebuild_ratio · beneficial pairs)` pairs are swapped: the pruned weight grows, the kept weight is dropped. The
number of kept weights does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.groups import from_groups, to_groups
from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM, as_fraction
from llm_barber.masking.selection import EXCLUDED, count_true, lowest, rank_within, sort_values


@dataclass(frozen=True)
class Rebuilt:
    """Rebuilt keep mask of one linear, and the number of its swaps.

    Attributes:
        keep: bool, (out, in), True survives.
        beneficial: number of pruned weights in beneficial pairs.
        grown: number of pruned weights that are kept now.
        dropped: number of kept weights that are pruned now; with granularity `block` it may differ from `grown`.
    """

    keep: Tensor
    beneficial: int
    grown: int
    dropped: int

    @classmethod
    def between(cls, before: Tensor, keep: Tensor, beneficial: int = 0) -> "Rebuilt":
        """Compare the masks before and after any number of steps.

        A weight that a step grows and a later step drops counts as neither.
        """
        return cls(keep, beneficial, int((keep & ~before).sum()), int((before & ~keep).sum()))


def rebuild_masks(
    keep: Sequence[Tensor],
    saliency: Sequence[Tensor],
    granularity: Granularity,
    rebuild_ratio: float,
    patterns: Sequence[NofM | None] | None = None,
    fixed: Sequence[Tensor] | None = None,
    pattern_granularity: Granularity | None = None,
) -> list[Rebuilt]:
    """Rebuild the masks of one block's linears.

    Example: keep=[[True, True, False, False]], saliency=[[1, 4, 3, 0]], OUTPUT, ratio 1 -> [[False, True, True, False]]
    The pairs are (3, 1) and (0, 4); the first is beneficial, and swapped.

    Args:
        keep: a bool tensor (out, in) per linear, True survives.
        saliency: a float32 tensor (out, in) per linear, at least 0; see `saliency.weight_gradient`.
        granularity: the set within which weights compete.
        rebuild_ratio: share of the beneficial pairs to swap, 0 to 1.
        patterns: each linear's N:M, which stays, if it has one: the weights that grow are chosen by granularity, then
            each group of M drops as many kept weights as grow in it, those with the lowest saliency.
        fixed: a bool tensor (out, in) per linear, True where a weight neither grows nor is dropped (it is zero in the
            dense model: moving it would change nothing but the count of zeros).
        pattern_granularity: the granularity of linears with N:M; None: `granularity`.

    Returns:
        One `Rebuilt` per linear.
    """
    if patterns is not None and any(patterns):
        if None in patterns:
            # Linears without N:M compete apart: with N:M, weights are dropped in the groups where others grow.
            return _by_kind(keep, saliency, granularity, rebuild_ratio, patterns, fixed, pattern_granularity)
        granularity = pattern_granularity or granularity
    shapes = [tuple(tensor.shape) for tensor in keep]
    growable, droppable = [~mask for mask in keep], list(keep)
    if fixed is not None:
        growable = [mask & ~stays for mask, stays in zip(growable, fixed, strict=True)]
        droppable = [mask & ~stays for mask, stays in zip(droppable, fixed, strict=True)]
    if patterns is not None and any(patterns):
        droppable = [_without_tails(mask, pattern) for mask, pattern in zip(droppable, patterns, strict=True)]
    grow_groups, drop_groups, pair_groups = [], [], []
    groups = (to_groups(tensors, granularity) for tensors in (growable, droppable, saliency))
    for grow_candidates, drop_candidates, scores in zip(*groups, strict=True):
        grow, drop, paired = _choose_pairs(grow_candidates, drop_candidates, scores, rebuild_ratio)
        grow_groups.append(grow)
        drop_groups.append(drop)
        pair_groups.append(paired)
    grow_masks, drop_masks, pair_masks = (
        from_groups(group, shapes, granularity) for group in (grow_groups, drop_groups, pair_groups)
    )
    results = []
    for index, mask in enumerate(keep):
        grow, drop = grow_masks[index], drop_masks[index]
        pattern = patterns[index] if patterns is not None else None
        if pattern is not None:
            grow, drop = _within_pattern(droppable[index], saliency[index], grow, pattern)
        results.append(Rebuilt.between(mask, (mask | grow) & ~drop, beneficial=int(pair_masks[index].count_nonzero())))
    return results


def _by_kind(
    keep: Sequence[Tensor],
    saliency: Sequence[Tensor],
    granularity: Granularity,
    ratio: float,
    patterns: Sequence[NofM | None],
    fixed: Sequence[Tensor] | None,
    pattern_granularity: Granularity | None,
) -> list[Rebuilt]:
    """Rebuild the linears without N:M, then those with N:M; arguments and result as in `rebuild_masks`."""
    results: dict[int, Rebuilt] = {}
    for structured in (False, True):
        indices = [index for index, pattern in enumerate(patterns) if (pattern is not None) is structured]
        rebuilt = rebuild_masks(
            [keep[index] for index in indices],
            [saliency[index] for index in indices],
            granularity,
            ratio,
            [patterns[index] for index in indices],
            None if fixed is None else [fixed[index] for index in indices],
            pattern_granularity,
        )
        results |= dict(zip(indices, rebuilt, strict=True))
    return [results[index] for index in range(len(keep))]


def _choose_pairs(growable: Tensor, droppable: Tensor, saliency: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mark the members that grow, those that are dropped, and the pruned members of beneficial pairs.

    All tensors are (groups, members); the masks are bool.
    """
    # Members that are not candidates sort behind all candidates, where no pair is beneficial.
    pruned_downwards = (~growable).float().mul_(EXCLUDED).sub_(saliency)
    kept_upwards = (~droppable).float().mul_(EXCLUDED).add_(saliency)
    pruned_ordered, kept_ordered = sort_values(pruned_downwards), sort_values(kept_upwards)
    pairs = count_true(-pruned_ordered > kept_ordered)
    share = as_fraction(ratio)
    swaps = pairs * share.numerator // share.denominator
    return (
        lowest(pruned_downwards, swaps, pruned_ordered),
        lowest(kept_upwards, swaps, kept_ordered),
        lowest(pruned_downwards, pairs, pruned_ordered),
    )


def _within_pattern(droppable: Tensor, saliency: Tensor, grow: Tensor, pattern: NofM) -> tuple[Tensor, Tensor]:
    """Limit growth to N:M: in each group of M as many weights grow as are dropped.

    Returns:
        The weights that grow, and those that are dropped; bool (out, in).
    """
    droppable_group, saliency_group, grow_group = (
        by_pattern_group(tensor, pattern) for tensor in (droppable, saliency, grow)
    )
    growing = grow_group.sum(-1, keepdim=True)
    available = droppable_group.sum(-1, keepdim=True)
    # With 1:4, three pruned weights may be chosen to grow where one can be dropped: the most salient of them grows.
    grow_rank = rank_within(torch.where(grow_group, -saliency_group, torch.inf))
    grow_group = grow_group & (grow_rank < available)
    drop_rank = rank_within(torch.where(droppable_group, saliency_group, torch.inf))
    drop_group = droppable_group & (drop_rank < growing)
    limited = torch.zeros_like(grow), torch.zeros_like(grow)
    for whole, group in zip(limited, (grow_group, drop_group), strict=True):
        by_pattern_group(whole, pattern).copy_(group)
    return limited


def _without_tails(mask: Tensor, pattern: NofM | None) -> Tensor:
    """Copy of a mask, bool (out, in), that is False in the tails of its rows."""
    if pattern is None or pattern.covered(mask.shape[1]) == mask.shape[1]:
        return mask
    whole = mask.clone()
    whole[:, pattern.covered(mask.shape[1]) :] = False
    return whole
