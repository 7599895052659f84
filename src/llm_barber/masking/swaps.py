"""Exact swaps: exchange a pruned weight of a row for a kept one as long as that lowers the row's output error.

A row w with keep mask m and the Gram matrix G = Σ x xᵀ of its inputs has the squared output error p·G·p, with
p = w(1 − m). With a target other than its own dense output on the same inputs there is a linear term: p·G·p − 2 p·l.
With c = Gp − l, adding back weight i changes it by −2wᵢcᵢ + wᵢ²Gᵢᵢ, removing j by 2wⱼcⱼ + wⱼ²Gⱼⱼ, and both together by
−2wᵢwⱼGᵢⱼ more. (SparseSwaps, 2025, takes the best of all pairs of a row, layer by layer.)

Rows work in rounds. A round takes the weights of each row that promise most, its working set, swaps among them, and
only then brings c up to date for the others: a swap reads a few dozen numbers instead of the whole row several times.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM

# A gain smaller than this share of the row's error is rounding.
SMALLEST_GAIN = 1e-6
# So many weights to add back, and as many to remove (or groups of M, as many weights in all), are looked at together.
WORKING_SET = 32
SWAPS_A_ROUND = 16
# Rows are taken so many weights at a time that what their rounds read and write stays in a processor's cache; on a GPU
# so many that it is busy.
WEIGHTS_AT_ONCE, WEIGHTS_ON_GPU = 2**20, 2**24


def swap_pairs(
    keep: Tensor,
    weight: Tensor,
    gram: Tensor,
    swaps: int,
    linear_term: Tensor | None = None,
    pattern: NofM | None = None,
    fixed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Refine the mask of one linear.

    Each step swaps, in every row at once, one pair of its working set. With N:M it is the best of all pairs within
    groups. Without, the better of two: the best weight to add back with the best to remove for it, and the other way
    round.

    Args:
        keep: bool, (out, in), True survives.
        weight: (out, in), the dense weights.
        gram: float32, (in, in), symmetric; any scale.
        swaps: most swaps a row.
        linear_term: float32, (out, in), l in the scale of `gram`; None: zero.
        pattern: N:M to keep up, if any.
        fixed: bool, (out, in), True where a weight neither comes nor goes.

    Returns:
        The keep mask, bool (out, in), with as many True a row (and group of M) as before, and the swaps of each row,
        int64 (out,).
    """
    keep, count = keep.clone(), torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
    if pattern is not None and not pattern.covered(keep.shape[1]):
        return keep, count
    size = max(1, (WEIGHTS_ON_GPU if keep.is_cuda else WEIGHTS_AT_ONCE) // keep.shape[1])
    for start in range(0, len(keep), size):
        rows = slice(start, start + size)
        term, unmoved = (None if one is None else one[rows] for one in (linear_term, fixed))
        keep[rows], count[rows] = _swap_rows(keep[rows], weight[rows].float(), gram, swaps, term, pattern, unmoved)
    return keep, count


def _swap_rows(
    keep: Tensor,
    weight: Tensor,
    gram: Tensor,
    swaps: int,
    linear_term: Tensor | None,
    pattern: NofM | None,
    fixed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The keep mask of some rows, and their swaps."""
    pruned = weight.masked_fill(keep, 0)
    product = pruned @ gram
    slope = product if linear_term is None else product - linear_term  # c
    error = (pruned * (product if linear_term is None else product - 2 * linear_term)).sum(1).abs()
    smallest = -SMALLEST_GAIN * error.clamp_min(torch.finfo(torch.float32).tiny)
    square = weight.square() * gram.diagonal()
    count = torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
    rows = torch.arange(len(keep), device=keep.device)  # that still gain
    while len(rows):
        state = _Rows(keep[rows], weight[rows], slope[rows], square[rows], None if fixed is None else fixed[rows])
        chosen = state.promising() if pattern is None else state.promising_groups(gram, pattern)
        working = state.working_set(chosen, gram, pattern)
        left = swaps - count[rows]
        done = working.swap(smallest[rows], left, SWAPS_A_ROUND)
        slope[rows] += embedding_bag(chosen, gram, mode="sum", per_sample_weights=working.change)
        # An index may be there twice, as what cannot move: what moved is added up, not written.
        moved = torch.zeros(len(rows), keep.shape[1], dtype=torch.int8, device=keep.device)
        keep[rows] ^= moved.scatter_add_(1, chosen, working.moved.to(torch.int8)).bool()
        count[rows] += done
        rows = rows[(done > 0) & (done < left)]
    return keep, count


@dataclass
class _Rows:
    """Some rows before a round, all (rows, in): see the top of this file. `square` is wᵢ²Gᵢᵢ."""

    keep: Tensor
    weight: Tensor
    slope: Tensor
    square: Tensor
    fixed: Tensor | None

    def __post_init__(self) -> None:
        """What adding back, and removing, each weight does to the error; infinite where it cannot be done."""
        slope = 2 * self.weight * self.slope
        fixed = torch.tensor(False, device=slope.device) if self.fixed is None else self.fixed
        self.grow = torch.where(self.keep | fixed, torch.inf, self.square - slope)
        self.drop = torch.where(self.keep & ~fixed, slope.add_(self.square), torch.inf)

    def promising(self) -> Tensor:
        """The weights that gain most when added back, and cost least when removed, (rows, set)."""
        size = min(WORKING_SET, self.keep.shape[1])
        return torch.cat([one.topk(size, 1, largest=False, sorted=False).indices for one in (self.grow, self.drop)], 1)

    def promising_groups(self, gram: Tensor, pattern: NofM) -> Tensor:
        """The weights of the groups of M whose best pair gains most, (rows, set)."""
        size = pattern.of
        rows, columns = self.weight.shape
        columns = pattern.covered(columns)
        # (groups, M, M): the blocks of the Gram matrix along its diagonal.
        blocks = (
            gram[:columns, :columns]
            .reshape(columns // size, size, columns // size, size)
            .diagonal(dim1=0, dim2=2)
            .movedim(-1, 0)
        )
        grow, drop, weight = (by_pattern_group(one, pattern) for one in (self.grow, self.drop, self.weight))
        gains = torch.full((rows, columns // size), torch.inf, device=gram.device)
        for coming in range(size):
            cross = weight * (-2 * weight[:, :, coming : coming + 1]) * blocks[:, coming]
            torch.minimum(gains, (cross + drop).amin(2) + grow[:, :, coming], out=gains)
        groups = gains.topk(
            min(max(1, 2 * WORKING_SET // size), columns // size), 1, largest=False, sorted=False
        ).indices
        return (groups.unsqueeze(2) * size + torch.arange(size, device=gram.device)).flatten(1)

    def working_set(self, chosen: Tensor, gram: Tensor, pattern: NofM | None) -> "_WorkingSet":
        """Some weights of each row, (rows, set)."""
        weight, grow, drop = (one.gather(1, chosen) for one in (self.weight, self.grow, self.drop))
        if pattern is None:  # a row that has too few of one kind chose some of the other kind twice
            grow[:, chosen.shape[1] // 2 :] = torch.inf
            drop[:, : chosen.shape[1] // 2] = torch.inf
        return _WorkingSet(chosen, weight, grow, drop, gram, None if pattern is None else pattern.of)


class _WorkingSet:
    """Some weights of each row, their places in it first, all (rows, set); the Gram matrix, (in, in).

    `size`: M, where the weights are whole groups of M and pairs lie in one group.
    """

    def __init__(
        self, chosen: Tensor, weight: Tensor, grow: Tensor, drop: Tensor, gram: Tensor, size: int | None
    ) -> None:
        self.chosen, self.weight, self.grow, self.drop, self.gram = chosen, weight, grow, drop, gram
        self.moved = torch.zeros_like(weight, dtype=torch.bool)  # has changed sides
        self._was_kept = drop.isfinite()
        self._rows = torch.arange(len(weight), device=weight.device)
        self._within = None
        if size is not None:
            places, own = chosen.view(len(chosen), -1, size), weight.view(len(weight), -1, size)
            self._within = gram[places.unsqueeze(3), places.unsqueeze(2)]  # (rows, groups, M coming, M going)
            self._within.mul_(2 * own.unsqueeze(3)).mul_(own.unsqueeze(2))

    @property
    def change(self) -> Tensor:
        """Of p, since the round began."""
        return torch.where(self._was_kept, self.weight, -self.weight) * self.moved

    def swap(self, smallest: Tensor, most: Tensor, steps: int) -> Tensor:
        """Swap pairs as long as one changes the error of its row by less than `smallest`, float32 (rows,).

        Returns:
            The swaps of each row, int64 (rows,), at most `most`, (rows,), and `steps`.
        """
        count = torch.zeros_like(most)
        for _ in range(steps):
            pair = self._best_of_two() if self._within is None else self._best_in_groups(self._within)
            active = (pair.gain < smallest) & (count < most)
            if not active.any():
                break
            self._exchange(pair, active)
            count += active
        return count

    def _cross(self, place: Tensor) -> Tensor:
        """2wᵢwⱼGᵢⱼ of all weights j with one weight i of each row, at `place` (rows,) in the set."""
        gram = self.gram[self.chosen[self._rows, place].unsqueeze(1), self.chosen]
        return gram.mul_(self.weight).mul_(2 * self.weight[self._rows, place].unsqueeze(1))

    def _best_of_two(self) -> "_Pair":
        """The better of the best weight to come with the best to go for it, and the other way round."""
        gain, coming = self.grow.min(1)
        with_coming = self._cross(coming)
        further, going = (self.drop - with_coming).min(1)
        other_gain, other_going = self.drop.min(1)
        with_going = self._cross(other_going)
        other_further, other_coming = (self.grow - with_going).min(1)
        gain, other_gain = gain + further, other_gain + other_further
        other = other_gain < gain
        wide = other.unsqueeze(1)
        second = self._cross(torch.where(other, other_coming, going))
        return _Pair(
            torch.where(other, other_coming, coming),
            torch.where(other, other_going, going),
            torch.where(other, other_gain, gain),
            torch.where(wide, second, with_coming),
            torch.where(wide, with_going, second),
        )

    def _best_in_groups(self, within: Tensor) -> "_Pair":
        """The best of all pairs within groups of M."""
        size = within.shape[2]
        grow, drop = (one.view(len(one), -1, size) for one in (self.grow, self.drop))
        gain, pair = (grow.unsqueeze(3) + drop.unsqueeze(2)).sub_(within).flatten(1).min(1)
        coming, place = pair // size, pair % size
        going = coming - coming % size + place
        return _Pair(coming, going, gain, self._cross(coming), self._cross(going))

    def _exchange(self, pair: "_Pair", active: Tensor) -> None:
        """Swap a pair in the rows that are `active`, bool (rows,)."""
        rows, coming, going = self._rows, pair.coming, pair.going
        both = pair.with_coming[rows, going]
        # What is not pruned any more costs nothing to remove again but what the slope says, and the other way round;
        # the moved weights' own numbers are those before, negated, moved by the other one alone.
        undo_come, undo_go = both - self.grow[rows, coming], both - self.drop[rows, going]
        to_others = pair.with_going.sub_(pair.with_coming).mul_(active.unsqueeze(1))
        self.grow.sub_(to_others)
        self.drop.add_(to_others)
        rows, coming, going = rows[active], coming[active], going[active]
        self.grow[rows, coming] = torch.inf
        self.drop[rows, going] = torch.inf
        self.drop[rows, coming] = undo_come[active]
        self.grow[rows, going] = undo_go[active]
        self.moved[rows, coming] ^= True
        self.moved[rows, going] ^= True


@dataclass
class _Pair:
    """Weights to swap, places in the set, and the change of the error, (rows,); what each has with all, (rows, set)."""

    coming: Tensor
    going: Tensor
    gain: Tensor
    with_coming: Tensor
    with_going: Tensor
