"""Rebuild a mask: swap the pruned weights that turned out salient with the kept weights that did not.

arXiv 2408.10631. Within each comparison group the pruned weights from high to low
saliency are paired with the kept weights from low to high; a pair is beneficial where the pruned one scores higher; the
first `floor(rebuild_ratio · beneficial pairs)` pairs are swapped. The number of kept weights does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.groups import from_groups, to_groups
from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM, as_fraction
from llm_barber.masking.selection import EXCLUDED, counted, lowest, rank_within, sort_values


@dataclass(frozen=True)
class Rebuilt:
    """A linear's rebuilt keep mask (bool, (out, in)) and what was swapped.

    `beneficial` counts its pruned weights that stand in a beneficial pair, `grown` those that came back, `dropped`
    the kept ones that went for them; with granularity `block`, grown and dropped of one linear may differ.
    """

    keep: Tensor
    beneficial: int
    grown: int
    dropped: int

    @classmethod
    def between(cls, before: Tensor, keep: Tensor, beneficial: int = 0) -> "Rebuilt":
        """What became of a mask in all steps: a weight that one brings back and a later one drops is neither."""
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

    Args:
        keep: a bool tensor (out, in) per linear, True survives.
        saliency: a float32 tensor (out, in) per linear, at least 0; see `saliency.weight_gradient`.
        granularity: the set within which weights compete.
        rebuild_ratio: share of the beneficial pairs to swap, 0 to 1.
        patterns: for each linear the N:M to keep up, if any: the growing weights are chosen by granularity, then each
            group of M drops as many kept weights as grow in it, those with the lowest saliency.
        fixed: a bool tensor (out, in) per linear, True where a weight neither grows nor drops (it is zero in the
            dense model, so that moving it would change nothing but the count of zeros).
        pattern_granularity: that of linears with N:M, where it is another one.

    Returns:
        One `Rebuilt` per linear.
    """
    if patterns is not None and any(patterns):
        if None in patterns:
            # N:M drops where it grows, so that such linears cannot exchange weights with unstructured ones.
            return _by_kind(keep, saliency, granularity, rebuild_ratio, patterns, fixed, pattern_granularity)
        granularity = pattern_granularity or granularity
    shapes = [tuple(tensor.shape) for tensor in keep]
    droppable = keep if fixed is None else [mask & ~stays for mask, stays in zip(keep, fixed, strict=True)]
    if patterns is not None and any(patterns):
        droppable = [_in_whole_groups(mask, pattern) for mask, pattern in zip(droppable, patterns, strict=True)]
    growable = [~mask for mask in keep] if fixed is None else [~(m | f) for m, f in zip(keep, fixed, strict=True)]
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
    """The linears of a block with N:M and those without, each kind by itself."""
    found: dict[int, Rebuilt] = {}
    for structured in (False, True):
        places = [index for index, pattern in enumerate(patterns) if (pattern is not None) is structured]
        rebuilt = rebuild_masks(
            [keep[index] for index in places],
            [saliency[index] for index in places],
            granularity,
            ratio,
            [patterns[index] for index in places],
            None if fixed is None else [fixed[index] for index in places],
            pattern_granularity,
        )
        found |= dict(zip(places, rebuilt, strict=True))
    return [found[index] for index in range(len(keep))]


def _choose_pairs(growable: Tensor, droppable: Tensor, saliency: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which members grow, which drop, and which pruned ones stand in a beneficial pair; all bool (groups, members)."""
    # Members of the other side sort behind all real ones, where no pair is beneficial.
    pruned_downwards = (~growable).float().mul_(EXCLUDED).sub_(saliency)
    kept_upwards = (~droppable).float().mul_(EXCLUDED).add_(saliency)
    pruned_ordered, kept_ordered = sort_values(pruned_downwards), sort_values(kept_upwards)
    pairs = counted(-pruned_ordered > kept_ordered)
    share = as_fraction(ratio)
    swaps = pairs * share.numerator // share.denominator
    return (
        lowest(pruned_downwards, swaps, pruned_ordered),
        lowest(kept_upwards, swaps, kept_ordered),
        lowest(pruned_downwards, pairs, pruned_ordered),
    )


def _within_pattern(droppable: Tensor, saliency: Tensor, grow: Tensor, pattern: NofM) -> tuple[Tensor, Tensor]:
    """N:M: as many weights drop in a group of M as grow in it, and no more grow than it has to drop."""
    droppable_group, saliency_group, grow_group = (
        by_pattern_group(tensor, pattern) for tensor in (droppable, saliency, grow)
    )
    growing = grow_group.sum(-1, keepdim=True)
    available = droppable_group.sum(-1, keepdim=True)
    # With 1:4 three pruned weights may want to grow where one can drop: the most salient ones go first.
    grow_rank = rank_within(torch.where(grow_group, -saliency_group, torch.inf))
    grow_group = grow_group & (grow_rank < available)
    drop_rank = rank_within(torch.where(droppable_group, saliency_group, torch.inf))
    drop_group = droppable_group & (drop_rank < growing)
    found = torch.zeros_like(grow), torch.zeros_like(grow)
    for whole, group in zip(found, (grow_group, drop_group), strict=True):
        by_pattern_group(whole, pattern).copy_(group)
    return found


def _in_whole_groups(mask: Tensor, pattern: NofM | None) -> Tensor:
    """A mask, (out, in), without the tails of its rows."""
    if pattern is None or pattern.covered(mask.shape[1]) == mask.shape[1]:
        return mask
    whole = mask.clone()
    whole[:, pattern.covered(mask.shape[1]) :] = False
    return whole
