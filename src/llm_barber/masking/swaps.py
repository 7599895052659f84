"""Exact swaps: exchange a pruned weight of a row for a kept one as long as that lowers the row's output error.

A row w with keep mask m and the Gram matrix G = Σ x xᵀ of its inputs has the squared output error p·G·p, with
p = w(1 − m). With a target other than its own dense output on the same inputs there is a linear term: p·G·p − 2 p·l.
With c = Gp − l, adding back weight i changes it by −2wᵢcᵢ + wᵢ²Gᵢᵢ, removing j by 2wⱼcⱼ + wⱼ²Gⱼⱼ, and both together by
−2wᵢwⱼGᵢⱼ more. (SparseSwaps, 2025, does the same layer by layer.)
"""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM

# A gain smaller than this share of the row's error is rounding.
SMALLEST_GAIN = 1e-6


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
    rows = torch.arange(len(keep), device=keep.device)
    state = _State(keep, weight.float(), gram, linear, fixed)
    smallest = -SMALLEST_GAIN * state.error.clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(swaps):
        coming, going, gain = state.best_in_groups(pattern) if pattern is not None else state.best_of_two()
        active = gain < smallest
        if not active.any():
            break
        if active.count_nonzero() * 4 < 3 * len(active):  # rows that are done need no more work
            state, rows, smallest = state.select(active), rows[active], smallest[active]
            coming, going = coming[active], going[active]
            active = active[active]
        state.swap(coming, going, active)
        moved = rows[active]
        keep[moved, coming[active]] = True
        keep[moved, going[active]] = False
        count[moved] += 1
    return keep, count


class _State:
    """What swaps change, for some rows: which weights may come and go, and what that would do to the error."""

    def __init__(self, keep: Tensor, weight: Tensor, gram: Tensor, linear: Tensor | None, fixed: Tensor | None) -> None:
        pruned = weight.masked_fill(keep, 0)
        moment = pruned @ gram
        self.error = (pruned * (moment if linear is None else moment - 2 * linear)).sum(1).abs()
        if linear is not None:
            moment = moment - linear
        self.weight = weight
        self.gram = gram
        self.square = weight.square() * gram.diagonal()
        self.slope = 2 * weight * moment
        movable = torch.ones_like(keep) if fixed is None else ~fixed
        self.growable = ~keep & movable
        self.droppable = keep & movable
        self.places = torch.arange(len(keep), device=keep.device)

    def select(self, rows: Tensor) -> "_State":
        """The state of some rows, bool (rows,)."""
        other = object.__new__(_State)
        other.gram = self.gram
        for name in ("error", "weight", "square", "slope", "growable", "droppable"):
            setattr(other, name, getattr(self, name)[rows])
        other.places = torch.arange(len(other.weight), device=rows.device)
        return other

    def _changes(self) -> tuple[Tensor, Tensor]:
        """What adding back, and what removing, each weight does to the error; infinite where it cannot be done."""
        grow = (self.square - self.slope).masked_fill_(~self.growable, torch.inf)
        drop = (self.square + self.slope).masked_fill_(~self.droppable, torch.inf)
        return grow, drop

    def _together(self, change: Tensor, other: Tensor) -> Tensor:
        """`change` of each weight, once weight number `other` of the row moves the opposite way."""
        factor = (-2 * self.weight[self.places, other]).unsqueeze(1)
        return torch.addcmul(change, self.weight * factor, self.gram[other])

    def best_of_two(self) -> tuple[Tensor, Tensor, Tensor]:
        """A pair to swap in each row, coming and going, and the change of the error."""
        grow, drop = self._changes()
        first_coming = grow.argmin(1)
        first_gain, first_going = self._together(drop, first_coming).min(1)
        first_gain = first_gain + grow[self.places, first_coming]
        second_going = drop.argmin(1)
        second_gain, second_coming = self._together(grow, second_going).min(1)
        second_gain = second_gain + drop[self.places, second_going]
        second = second_gain < first_gain
        return (
            torch.where(second, second_coming, first_coming),
            torch.where(second, second_going, first_going),
            torch.where(second, second_gain, first_gain),
        )

    def best_in_groups(self, pattern: NofM) -> tuple[Tensor, Tensor, Tensor]:
        """The best pair within a group of M of each row, and the change of the error."""
        size = pattern.of
        rows, columns = self.weight.shape
        grow, drop = (change.view(rows, -1, size) for change in self._changes())
        grouped = self.weight.view(rows, -1, size)
        # (groups, M, M): the blocks of the Gram matrix along its diagonal.
        blocks = self.gram.view(columns // size, size, columns // size, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        best: list[tuple[Tensor, Tensor]] = []
        for place in range(size):  # of the weight that comes, in its group: M passes over (rows, in)
            cross = grouped * (-2 * grouped[..., place : place + 1]) * blocks[:, place]
            gain, going = (drop + cross).min(-1)
            best.append((gain + grow[..., place], going))
        gains = torch.stack([gain for gain, _ in best], -1).flatten(1)
        goings = torch.stack([going for _, going in best], -1).flatten(1)
        gain, coming = gains.min(1)
        going = coming // size * size + goings[self.places, coming]
        return coming, going, gain

    def swap(self, coming: Tensor, going: Tensor, active: Tensor) -> None:
        """Do it in the active rows, and carry its effect on all other changes of these rows."""
        amount = active.to(self.weight.dtype)
        comes = (self.weight[self.places, coming] * amount).unsqueeze(1)
        goes = (self.weight[self.places, going] * amount).unsqueeze(1)
        moment = torch.addcmul(goes * self.gram[going], comes, self.gram[coming], value=-1)
        self.slope.addcmul_(self.weight, moment, value=2)
        for mask, places, value in (
            (self.growable, coming, False),
            (self.droppable, coming, True),
            (self.growable, going, True),
            (self.droppable, going, False),
        ):
            mask[self.places[active], places[active]] = value
