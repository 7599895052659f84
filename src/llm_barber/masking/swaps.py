"""Exact swaps: exchange a pruned weight of a row for a kept one as long as that lowers the row's output error.

A row w with keep mask m and the Gram matrix G = Σ x xᵀ of its inputs has the squared output error p·G·p, with
p = w(1 − m). With a target other than its own dense output on the same inputs there is a linear term: p·G·p − 2 p·l.
With c = Gp − l, adding back weight i changes it by −2wᵢcᵢ + wᵢ²Gᵢᵢ, removing j by 2wⱼcⱼ + wⱼ²Gⱼⱼ, and both together by
−2wᵢwⱼGᵢⱼ more. (SparseSwaps, 2025, does the same layer by layer.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM

# A gain smaller than this share of the row's error is rounding.
SMALLEST_GAIN = 1e-6
# Rows are taken so many at a time that what their swaps read and write again and again stays in a core's cache.
CACHED_WEIGHTS = 2**17


def swap_pairs(
    keep: Tensor,
    weight: Tensor,
    gram: Tensor,
    swaps: int,
    linear: Tensor | None = None,
    pattern: NofM | None = None,
    fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Refine the mask of one linear.

    Each step swaps, in every row at once, one pair. With N:M it is the best of all pairs within groups. Without, the
    better of two: the best weight to add back with the best to remove for it, and the other way round.

    Args:
        keep: bool, (out, in), True survives.
        weight: (out, in), the dense weights.
        gram: float32, (in, in), symmetric; any scale.
        swaps: most swaps a row.
        linear: float32, (out, in), l in the scale of `gram`; None: zero.
        pattern: N:M to keep up, if any.
        fixed: bool, (out, in), True where a weight neither comes nor goes.

    Returns:
        The keep mask, bool (out, in), with as many True a row (and group of M) as before, and the swaps of each row,
        int64 (out,).
    """
    keep, count = keep.clone(), torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
    size = len(keep) if keep.device.type == "cuda" else max(1, CACHED_WEIGHTS // keep.shape[1])
    for start in range(0, len(keep), size):
        rows = slice(start, start + size)
        own = [None if one is None else one[rows] for one in (linear, fixed)]
        _swap_rows(keep[rows], count[rows], weight[rows].float(), gram, swaps, own[0], pattern, own[1])
    return keep, count


def _swap_rows(
    keep: Tensor,
    count: Tensor,
    weight: Tensor,
    gram: Tensor,
    swaps: int,
    linear: Tensor | None,
    pattern: NofM | None,
    fixed: Tensor | None,
) -> None:
    """Swap in some rows, whose `keep` and `count` are changed."""
    rows = torch.arange(len(keep), device=keep.device)
    state = _State.of(keep, weight, gram, linear, fixed)
    cross = None if pattern is None else state.cross_in_groups(pattern)
    for _ in range(swaps):
        coming, going, gain = state.best_of_two() if cross is None else state.best_in_groups(cross)
        active = gain < state.smallest
        left = int(active.count_nonzero())
        if not left:
            break
        if left < len(active):  # rows that are done need no more work
            state, rows = state.select(active), rows[active]
            cross = None if cross is None else cross[active]
            coming, going = coming[active], going[active]
        state.swap(coming, going)
        keep[rows, coming] = True
        keep[rows, going] = False
        count[rows] += 1


@dataclass
class _State:
    """What swaps change, for some rows; all but `gram` (in, in) and `smallest` (rows,) are (rows, in).

    `grow` and `drop`: what adding back, and removing, each weight does to the error; infinite where it cannot be done.
    `smallest`: the change of the error that is worth a swap.
    """

    weight: Tensor
    gram: Tensor
    grow: Tensor
    drop: Tensor
    smallest: Tensor

    @classmethod
    def of(cls, keep: Tensor, weight: Tensor, gram: Tensor, linear: Tensor | None, fixed: Tensor | None) -> "_State":
        """The state before the first swap."""
        pruned = weight.masked_fill(keep, 0)
        moment = pruned @ gram
        error = (pruned * (moment if linear is None else moment - 2 * linear)).sum(1).abs()
        slope = 2 * weight * (moment if linear is None else moment - linear)
        square = weight.square() * gram.diagonal()
        stays = torch.zeros_like(keep) if fixed is None else fixed
        return cls(
            weight,
            gram,
            (square - slope).masked_fill_(keep | stays, torch.inf),
            (square + slope).masked_fill_(~keep | stays, torch.inf),
            -SMALLEST_GAIN * error.clamp_min(torch.finfo(torch.float32).tiny),
        )

    def select(self, rows: Tensor) -> "_State":
        """The state of some rows, bool (rows,)."""
        return _State(self.weight[rows], self.gram, self.grow[rows], self.drop[rows], self.smallest[rows])

    def _of(self, places: Tensor, values: Tensor) -> Tensor:
        """The value of each row at a place of its own, (rows,)."""
        return values.gather(1, places.unsqueeze(1)).squeeze(1)

    def _together(self, change: Tensor, other: Tensor) -> Tensor:
        """`change` of each weight, once weight number `other` of the row moves the opposite way."""
        cross = self.gram[other].mul_((-2 * self._of(other, self.weight)).unsqueeze(1))
        return cross.mul_(self.weight).add_(change)

    def best_of_two(self) -> tuple[Tensor, Tensor, Tensor]:
        """A pair to swap in each row, coming and going, and the change of the error."""
        first_gain, first_coming = self.grow.min(1)
        further, first_going = self._together(self.drop, first_coming).min(1)
        first_gain = first_gain + further
        second_gain, second_going = self.drop.min(1)
        further, second_coming = self._together(self.grow, second_going).min(1)
        second_gain = second_gain + further
        second = second_gain < first_gain
        return (
            torch.where(second, second_coming, first_coming),
            torch.where(second, second_going, first_going),
            torch.where(second, second_gain, first_gain),
        )

    def cross_in_groups(self, pattern: NofM) -> Tensor:
        """What two weights of a group cost together beyond what each does, (rows, groups, M coming, M going)."""
        size = pattern.of
        rows, columns = self.weight.shape
        grouped = self.weight.view(rows, -1, size)
        # (groups, M, M): the blocks of the Gram matrix along its diagonal.
        blocks = self.gram.view(columns // size, size, columns // size, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return (grouped.unsqueeze(3) * grouped.unsqueeze(2)).mul_(blocks).mul_(-2)

    def best_in_groups(self, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best pair within a group of M of each row, and the change of the error."""
        rows, groups, size, _ = cross.shape
        drop = self.drop.view(rows, groups, size)
        gain, coming = (cross + drop.unsqueeze(2)).amin(3).view(rows, -1).add_(self.grow).min(1)
        group, place = coming // size, coming % size
        row = torch.arange(rows, device=cross.device)
        going = (cross[row, group, place] + drop[row, group]).argmin(1) + group * size
        return coming, going, gain

    def swap(self, coming: Tensor, going: Tensor) -> None:
        """Do it, and carry its effect on all other changes of these rows: the slope 2 w (Gp − l) moves with p."""
        came, went = (self._of(places, self.weight) for places in (coming, going))
        # What is not pruned any more costs nothing to remove again but what the slope says, and the other way round.
        undo_come, undo_go = -self._of(coming, self.grow), -self._of(going, self.drop)
        moment = self.gram[going].mul_((2 * went).unsqueeze(1))
        moment.sub_(self.gram[coming].mul_((2 * came).unsqueeze(1))).mul_(self.weight)
        self.grow.sub_(moment)
        self.drop.add_(moment)
        # The moved weights change sides: their own numbers are those before, negated, moved by the other one alone.
        cross = 2 * came * went * self.gram[going, coming]
        for values, places, new in (
            (self.grow, coming, None),
            (self.drop, going, None),
            (self.drop, coming, undo_come + cross),
            (self.grow, going, undo_go + cross),
        ):
            filled = torch.full_like(came, torch.inf) if new is None else new
            values.scatter_(1, places.unsqueeze(1), filled.unsqueeze(1))
