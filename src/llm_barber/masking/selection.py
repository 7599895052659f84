"""Choose exactly k members of each group by score, ties by position: the step that makes every mask.

Real weights, dequantised ones above all, have many equal scores. A threshold with `<=` would take all of them and
overshoot; here the leftmost of the equal scores are taken, as in a stable sort.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from llm_barber.native.borders import can_select, find_borders

# A GPU sorts whole groups, at most this many members together, unless a single group has more.
SORTED_ON_GPU = 2**24
LONGEST_ON_GPU = 2**31 - 1  # members of a group: the most that `torch.sort` takes on CUDA
# A GPU selects the border of a group, without sorting it, in one block of threads: so many groups keep it busy.
SELECTED_ON_GPU = 64
MOST_RUNS = 2  # of groups whose borders are selected in an operation each, however few groups they have

Runs = tuple[tuple[int, int], ...]  # groups that follow each other, and the number of members to mark in each of them


def sort_values(scores: Tensor) -> Tensor:
    """Sort the scores of each group upwards; float32 (groups, members).

    On CPUs numpy's vectorised sort is about ten times as fast as `torch.sort`, which also sorts indices.
    """
    return _sort_on_host(scores) if scores.device.type == "cpu" else sort_on_gpu(scores)


def sort_on_gpu(scores: Tensor) -> Tensor:
    """Sort as `sort_values`, a few groups at a time; groups that are too long for a GPU's sort go to the host.

    `torch.sort` takes 32 to 44 bytes of memory for each member that it sorts at once.
    """
    groups, members = scores.shape
    if members > LONGEST_ON_GPU:
        return _sort_on_host(scores.cpu()).to(scores.device)
    together = max(1, SORTED_ON_GPU // max(1, members))
    if groups <= together:
        return scores.sort(dim=-1).values
    ordered = torch.empty_like(scores)
    for first in range(0, groups, together):
        part = slice(first, first + together)
        ordered[part] = scores[part].sort(dim=-1).values
    return ordered


def _sort_on_host(scores: Tensor) -> Tensor:
    return torch.from_numpy(numpy.sort(scores.detach().numpy(), axis=-1))


# Score of a member that does not compete: above every real score. It is finite, so that 0 · EXCLUDED is not NaN.
EXCLUDED = torch.finfo(torch.float32).max


def apply_mask(weight: Tensor, keep: Tensor) -> Tensor:
    """Keep the weights where `keep`, bit for bit, and set the rest to +0.0; both (out, in).

    The bits are multiplied by 0 or 1: +0.0 has no bit set. On CPUs that is over ten times as fast as `torch.where`,
    and unlike a product of floats it gives no −0.0.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return (weight.contiguous().view(bits) * keep).view(weight.dtype)


def count_true(mask: Tensor) -> Tensor:
    """Count the True members of each group of a mask, bool (groups, members): int64 (groups,)."""
    return mask.sum(1, dtype=count_dtype(mask)).long()


def count_dtype(mask: Tensor) -> torch.dtype:
    """Dtype for counts of members, (groups, members); a group of all experts of a large layer needs int64."""
    return torch.int32 if mask.shape[1] < 2**31 else torch.int64


def lowest(scores: Tensor, count: int | Tensor, ordered: Tensor | None = None) -> Tensor:
    """Mark the `count` lowest scores of each group; equal scores are taken from the left.

    Example: scores=[[2, 1, 2, 3]], count=2 -> [[True, True, False, False]]

    Args:
        scores: (groups, members), float32, without NaN.
        count: number of members to mark in each group: an int, or int64 (groups,).
        ordered: `sort_values(scores)`; None: computed here.

    Returns:
        bool, (groups, members), with exactly `count` True in each group.
    """
    given = torch.as_tensor(count)
    on_host = given.device.type == "cpu"  # a GPU would be waited for
    if on_host and not given.any():
        return torch.zeros_like(scores, dtype=torch.bool)
    runs = equal_runs(given.expand(len(scores))) if on_host and scores.device.type != "cpu" else None
    if runs is None:
        counts = given.to(scores.device).expand(len(scores))
    else:  # made on the device: a copy would be waited for
        counts = torch.cat([torch.full((groups,), number, device=scores.device) for groups, number in runs])
    return _without_ties([_UpToBorder.of(scores, counts, ordered, runs)])[0]


def lowest_of_each(scores: Sequence[Tensor], counts: Sequence[Tensor], runs: Sequence[Runs | None]) -> list[Tensor]:
    """`lowest` of several tensors of scores; a GPU is waited for once, not once for each tensor.

    Args:
        scores: each (groups, members), float32, without NaN.
        counts: of each, the number of members to mark in each group: int64 (groups,).
        runs: `equal_runs` of each one's counts; None: they are not known.
    """
    of_each = zip(scores, counts, runs, strict=True)
    return _without_ties([_UpToBorder.of(tensor, wanted, None, known) for tensor, wanted, known in of_each])


def equal_runs(counts: Tensor) -> Runs | None:
    """Runs of groups that have as many members to mark, of int64 (groups,).

    None: there are more than `MOST_RUNS`, and some are too short for their borders to be selected. A GPU that has the
    counts is waited for. Example: [3, 3, 2] -> ((2, 3), (1, 2)).
    """
    numbers, lengths = (values.tolist() for values in torch.unique_consecutive(counts, return_counts=True))
    selected = len(numbers) <= MOST_RUNS or min(lengths) >= SELECTED_ON_GPU
    return tuple(zip(lengths, numbers, strict=True)) if selected else None


@dataclass(frozen=True)
class _UpToBorder:
    """Members up to the border of each group, the score of the last of its `counts` lowest members.

    `chosen`: bool, (groups, members); with ties at the border, more than `counts` members. `surplus`: bool, (groups,),
    True for groups with such ties.
    """

    scores: Tensor
    counts: Tensor
    border: Tensor
    chosen: Tensor
    surplus: Tensor

    @classmethod
    def of(
        cls, scores: Tensor, counts: Tensor, ordered: Tensor | None = None, runs: Runs | None = None
    ) -> "_UpToBorder":
        """Find the borders, from the sorted scores if they are known, and without sorting where that is faster."""
        on_cpu = scores.device.type == "cpu"
        if ordered is None and on_cpu and can_select():
            border, surplus = find_borders(scores, counts)
            return cls(scores, counts, border, scores <= border, surplus)
        if ordered is None and runs is not None and not on_cpu and len(scores) >= SELECTED_ON_GPU:
            return cls._selected(scores, counts, runs)
        ordered = sort_values(scores) if ordered is None else ordered
        last = scores.shape[1] - 1
        border, following = (ordered.gather(1, place.clamp(0, last).unsqueeze(1)) for place in (counts - 1, counts))
        border = border.masked_fill((counts == 0).unsqueeze(1), -torch.inf)
        surplus = (following <= border).squeeze(1) & (counts <= last)
        return cls(scores, counts, border, scores <= border, surplus)

    @classmethod
    def _selected(cls, scores: Tensor, counts: Tensor, runs: Runs) -> "_UpToBorder":
        """Find the borders without sorting, which on a GPU takes several times as long."""
        parts = torch.split(scores, [groups for groups, _ in runs])
        border = torch.cat(
            [
                part.kthvalue(count, 1, keepdim=True).values if count else part.new_full((len(part), 1), -torch.inf)
                for part, (_, count) in zip(parts, runs, strict=True)
            ]
        )
        chosen = scores <= border
        return cls(scores, counts, border, chosen, count_true(chosen) > counts)

    def break_ties(self) -> Tensor:
        """Members up to the border without the surplus; equal scores are taken from the left."""
        if self.scores.device.type != "cpu":  # a GPU would wait to know which groups have ties
            return _break_ties(self.scores, self.border, self.counts)
        groups = self.surplus
        self.chosen[groups] = _break_ties(self.scores[groups], self.border[groups], self.counts[groups])
        return self.chosen


def _without_ties(marked: Sequence[_UpToBorder]) -> list[Tensor]:
    """Masks with exactly the wanted number of members in each group."""
    tied: list[bool] = torch.stack([members.surplus.any() for members in marked]).tolist() if marked else []
    return [members.break_ties() if ties else members.chosen for members, ties in zip(marked, tied, strict=True)]


def _break_ties(scores: Tensor, border: Tensor, counts: Tensor) -> Tensor:
    """Mark as `lowest` does, by the borders (groups, 1)."""
    below = scores < border
    tied = scores == border
    room = (counts - below.sum(1)).unsqueeze(1)
    return below | (tied & (tied.cumsum(1, dtype=count_dtype(tied)) <= room))


def rank_within(scores: Tensor) -> Tensor:
    """Rank each member within its small group, 0 for the lowest, ties by position.

    Example: scores=[[3, 1, 3, 2]] -> [[2, 0, 3, 1]]

    Made for the groups of N:M: a tensor holds the first members of all groups, another the second members, and so on,
    so that each of the M(M − 1)/2 comparisons is one of long rows: for M = 4, three times as fast as broadcasting.

    Args:
        scores: (..., M).

    Returns:
        int16, (..., M).
    """
    members = [member.contiguous() for member in scores.unbind(-1)]
    ranks = [torch.zeros_like(member, dtype=torch.int16) for member in members]
    for later in range(1, len(members)):
        for earlier in range(later):
            lower = members[later] < members[earlier]
            ranks[earlier] += lower
            ranks[later] += ~lower
    return torch.stack(ranks, -1)
