"""Saliency and pattern → keep mask: the lowest scores of each comparison group are pruned."""

from torch import Tensor

from llm_barber.masking.granularity import Granularity, from_groups, to_groups
from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.masking.selection import lowest, rank_within


def initial_mask(saliency: Tensor, pattern: Pattern, granularity: Granularity) -> Tensor:
    """Keep mask of one linear.

    Args:
        saliency: (out, in), float32.
        pattern: how many weights go. N:M compares within its groups of M, whatever the granularity.
        granularity: `output` (Wanda) or `linear` (magnitude) or `input`.

    Returns:
        bool, (out, in), True survives. Exactly `pattern.pruned(members)` weights of each group are pruned, or M - N
        of each M.

    Raises:
        ValueError: M does not divide the row.
    """
    if isinstance(pattern, NofM):
        return rank_within(by_pattern_group(saliency, pattern)).ge(pattern.of - pattern.kept).reshape(saliency.shape)
    (groups,) = to_groups([saliency], granularity)
    pruned = lowest(groups, pattern.pruned(groups.shape[1]))
    (pruned,) = from_groups([pruned], [tuple(saliency.shape)], granularity)
    return ~pruned


def by_pattern_group(tensor: Tensor, pattern: NofM) -> Tensor:
    """Reshape (out, in) to (out, in / M, M).

    Raises:
        ValueError: M does not divide the row.
    """
    rows, columns = tensor.shape
    if columns % pattern.of:
        raise ValueError(f"pattern {pattern} does not divide a row of {columns} inputs")
    return tensor.reshape(rows, columns // pattern.of, pattern.of)
