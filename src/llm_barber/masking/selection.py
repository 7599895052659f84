"""Choose exactly k members of each group by score, ties by position: what every mask here is made with.

Real weights (dequantised ones above all) are full of equal scores. A threshold with `<=` takes all of them and
overshoots; here a tie at the border goes to the lower position, as a stable sort would have it.
"""

import numpy
import torch
from torch import Tensor


def sort_values(scores: Tensor) -> Tensor:
    """Scores (groups, members), float32, sorted upwards within each group.

    On CPUs numpy's vectorised sort is about ten times as fast as `torch.sort`, which also carries indices that
    nothing here needs.
    """
    if scores.device.type == "cpu":
        return torch.from_numpy(numpy.sort(scores.detach().numpy(), axis=-1))
    return scores.sort(dim=-1).values


# "Not in the competition", in scores: behind every real one, and reached by adding, without a NaN from 0 · inf.
EXCLUDED = torch.finfo(torch.float32).max


def apply_mask(weight: Tensor, keep: Tensor) -> Tensor:
    """The weights where `keep`, +0.0 elsewhere, bit for bit; both (out, in).

    Multiplies the bits by 0 or 1: +0.0 has no bit set. On CPUs that is over ten times as fast as `torch.where`, and
    unlike a product of floats it leaves no -0.0.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return (weight.contiguous().view(bits) * keep).view(weight.dtype)


def counted(mask: Tensor) -> Tensor:
    """How many members of each group are True, int64 (groups,), of bool (groups, members)."""
    return mask.sum(1, dtype=counter(mask)).long()


def counter(mask: Tensor) -> torch.dtype:
    """The dtype to count (groups, members) in: all experts of a large layer may be one group."""
    return torch.int32 if mask.shape[1] < 2**31 else torch.int64


def lowest(scores: Tensor, count: int | Tensor, ordered: Tensor | None = None) -> Tensor:
    """Mark the `count` lowest scores of each group; equal scores at the border are taken from the left.

    Args:
        scores: (groups, members), float32, without NaN.
        count: how many in each group: one int, or int64 of shape (groups,).
        ordered: `sort_values(scores)`, where the caller has it already.

    Returns:
        bool, (groups, members), with exactly `count` True a group.
    """
    groups, members = scores.shape
    counts = torch.as_tensor(count, device=scores.device).expand(groups)
    if not counts.any():
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = sort_values(scores) if ordered is None else ordered
    border = ordered.gather(1, (counts - 1).clamp(0, members - 1).unsqueeze(1))
    border = border.masked_fill((counts == 0).unsqueeze(1), -torch.inf)
    chosen = scores <= border
    surplus = counted(chosen) != counts
    if surplus.any():
        chosen[surplus] = _break_ties(scores[surplus], border[surplus], counts[surplus])
    return chosen


def _break_ties(scores: Tensor, border: Tensor, counts: Tensor) -> Tensor:
    """`lowest` for the groups in which more than `counts` members are at or under the border."""
    below = scores < border
    tied = scores == border
    room = (counts - below.sum(1)).unsqueeze(1)
    return below | (tied & (tied.cumsum(1, dtype=counter(tied)) <= room))


def rank_within(scores: Tensor) -> Tensor:
    """Rank of each member within its small group, 0 the lowest, ties by position.

    For the groups of N:M: the first members of all groups in one tensor, the second in another, and so on, so that
    every comparison is one of long rows. M(M - 1)/2 of them, and for M of 4 three times as fast as M broadcast ones.

    Args:
        scores: (..., M).

    Returns:
        int16, (..., M).
    """
    members = [one.contiguous() for one in scores.unbind(-1)]
    ranks = [torch.zeros_like(one, dtype=torch.int16) for one in members]
    for later in range(1, len(members)):
        for earlier in range(later):
            lower = members[later] < members[earlier]
            ranks[earlier] += lower
            ranks[later] += ~lower
    return torch.stack(ranks, -1)
