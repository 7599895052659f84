"""Saliency and pattern → keep mask: the lowest scores of each comparison group are pruned."""

import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.groups import from_groups, to_groups
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import lowest, rank_within


def initial_mask(saliency: Tensor, pattern: Pattern, granularity: Granularity) -> Tensor:
    """Keep mask of one linear.

    Example: saliency=[[4, 1, 3, 2]], pattern=Unstructured(0.5), granularity=OUTPUT -> [[True, False, True, False]]

    Args:
        saliency: (out, in), float32.
        pattern: number of weights to prune. N:M compares within its groups of M, whatever the granularity.
        granularity: `output` (Wanda), `linear` (magnitude) or `input`.

    Returns:
        bool, (out, in), True survives. Exactly `pruned_counts(pattern, groups, members)` weights of each group are
        pruned, or M − N of each whole group of M.
    """
    if isinstance(pattern, NofM):
        keep = torch.ones_like(saliency, dtype=torch.bool)
        ranks = rank_within(by_pattern_group(saliency, pattern))
        by_pattern_group(keep, pattern).copy_(ranks >= pattern.of - pattern.kept)
        return keep
    (groups,) = to_groups([saliency], granularity)
    pruned = lowest(groups, pruned_counts(pattern, *groups.shape))
    (pruned,) = from_groups([pruned], [tuple(saliency.shape)], granularity)
    return ~pruned


def pruned_counts(pattern: Unstructured, groups: int, members: int) -> int | Tensor:
    """Number of weights to prune in each comparison group, int or int64 (groups,); never all of a group."""
    if not pattern.over_linear:
        return pattern.pruned(members)
    count = min(pattern.nearest(groups * members), groups * (members - 1))
    return count // groups + (torch.arange(groups) < count % groups)


def by_pattern_group(tensor: Tensor, pattern: NofM) -> Tensor:
    """View the whole groups of M of a tensor (out, in) as (out, in // M, M)."""
    rows, columns = tensor.shape
    return tensor[:, : pattern.covered(columns)].view(rows, columns // pattern.of, pattern.of)
