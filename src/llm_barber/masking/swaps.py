"""Exact swaps: grow a pruned weight and drop a kept one, as long as that lowers the output error.

A row w with keep mask m and the Gram matrix G = Σ x xᵀ of its inputs has the squared output error p·G·p, with
p = w(1 − m). If its target is not its dense output on the same inputs, there is a linear term: p·G·p − 2 p·l.
With c = Gp − l, growing weight i changes the error by −2wᵢcᵢ + wᵢ²Gᵢᵢ, dropping weight j by 2wⱼcⱼ + wⱼ²Gⱼⱼ, and both
together by −2wᵢwⱼGᵢⱼ more. (SparseSwaps, 2025, takes the best of all pairs of a row, layer by layer.)

Rows are swapped in rounds. A round takes the working set of each row, the weights that promise most, and swaps among
them. Only then is c updated for the whole row: a swap reads a few dozen numbers instead of the whole row several times.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llm_barber.masking.initial import by_pattern_group
from llm_barber.masking.pattern import NofM

# A gain smaller than this share of the row's error is rounding.
SMALLEST_GAIN = 1e-6
# Number of weights to grow, and of weights to drop, in a working set. With N:M it has whole groups of M, of about
# 2 · WORKING_SET weights together.
WORKING_SET = 32
SWAPS_A_ROUND = 16
# Rows are swapped in parts of this many weights, so that a round's data stays in a processor's cache; a GPU needs more
# weights to be busy.
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

    Each step swaps one pair of the working set in every row. With N:M it is the best of all pairs within groups.
    Without, it is the better of two pairs: the best weight to grow with the best to drop for it, or the best weight to
    drop with the best to grow for it.

    Example: keep=[[True, True, False, False]], weight=[[1, 2, 3, 2]], gram=identity -> [[False, True, True, False]]
    The error falls from 3² + 2² to 1² + 2²; no second swap lowers it.

    Args:
        keep: bool, (out, in), True survives.
        weight: (out, in), the dense weights.
        gram: float32, (in, in), symmetric; any scale.
        swaps: maximal number of swaps in a row.
        linear_term: float32, (out, in), l in the scale of `gram`; None: zero.
        pattern: the mask's N:M, which stays, if it has one.
        fixed: bool, (out, in), True where a weight neither grows nor is dropped.

    Returns:
        The keep mask, bool (out, in), with as many True in each row (and group of M) as before, and the number of
        swaps of each row, int64 (out,).
    """
    keep, count = keep.clone(), torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
    if pattern is not None and not pattern.covered(keep.shape[1]):
        return keep, count
    size = max(1, (WEIGHTS_ON_GPU if keep.is_cuda else WEIGHTS_AT_ONCE) // keep.shape[1])
    for start in range(0, len(keep), size):
        rows = slice(start, start + size)
        term, stays = (None if tensor is None else tensor[rows] for tensor in (linear_term, fixed))
        keep[rows], count[rows] = _swap_rows(keep[rows], weight[rows].float(), gram, swaps, term, pattern, stays)
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
    """Refine the mask of some rows; arguments and result as in `swap_pairs`, weights float32."""
    pruned = weight.masked_fill(keep, 0)
    product = pruned @ gram
    slope = product if linear_term is None else product - linear_term  # c
    error = (pruned * (product if linear_term is None else product - 2 * linear_term)).sum(1).abs()
    smallest = -SMALLEST_GAIN * error.clamp_min(torch.finfo(torch.float32).tiny)
    square = weight.square() * gram.diagonal()
    count = torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
    rows = torch.arange(len(keep), device=keep.device)  # rows that still gain
    while len(rows):
        state = _Rows(keep[rows], weight[rows], slope[rows], square[rows], None if fixed is None else fixed[rows])
        chosen = state.promising() if pattern is None else state.promising_groups(gram, pattern)
        working = state.working_set(chosen, gram, pattern)
        left = swaps - count[rows]
        done = working.swap(smallest[rows], left, SWAPS_A_ROUND)
        slope[rows] += embedding_bag(chosen, gram, mode="sum", per_sample_weights=working.change)
        # A column may be chosen twice, once as a weight that cannot move: add up what moved instead of writing it.
        moved = torch.zeros(len(rows), keep.shape[1], dtype=torch.int8, device=keep.device)
        keep[rows] ^= moved.scatter_add_(1, chosen, working.moved.to(torch.int8)).bool()
        count[rows] += done
        rows = rows[(done > 0) & (done < left)]
    return keep, count


@dataclass
class _Rows:
    """Rows before a round, all tensors (rows, in); `slope` is c and `square` is wᵢ²Gᵢᵢ (see the top)."""

    keep: Tensor
    weight: Tensor
    slope: Tensor
    square: Tensor
    fixed: Tensor | None

    def __post_init__(self) -> None:
        """Compute how growing, or dropping, each weight changes the error; infinite where that is impossible."""
        slope = 2 * self.weight * self.slope
        fixed = torch.zeros((), dtype=torch.bool, device=slope.device) if self.fixed is None else self.fixed
        self.grow = torch.where(self.keep | fixed, torch.inf, self.square - slope)
        self.drop = torch.where(self.keep & ~fixed, slope.add_(self.square), torch.inf)

    def promising(self) -> Tensor:
        """Columns of the weights that gain most when grown, and cost least when dropped, (rows, set)."""
        size = min(WORKING_SET, self.keep.shape[1])
        changes = (self.grow, self.drop)
        return torch.cat([change.topk(size, 1, largest=False, sorted=False).indices for change in changes], 1)

    def promising_groups(self, gram: Tensor, pattern: NofM) -> Tensor:
        """Columns of the groups of M whose best pair gains most, (rows, set)."""
        size = pattern.of
        rows, columns = self.weight.shape
        columns = pattern.covered(columns)
        # The blocks of the Gram matrix along its diagonal, (groups, M, M).
        blocks = (
            gram[:columns, :columns]
            .reshape(columns // size, size, columns // size, size)
            .diagonal(dim1=0, dim2=2)
            .movedim(-1, 0)
        )
        grow, drop, weight = (by_pattern_group(tensor, pattern) for tensor in (self.grow, self.drop, self.weight))
        gains = torch.full((rows, columns // size), torch.inf, device=gram.device)
        for member in range(size):  # the member of each group that grows
            cross = weight * (-2 * weight[:, :, member : member + 1]) * blocks[:, member]
            torch.minimum(gains, (cross + drop).amin(2) + grow[:, :, member], out=gains)
        count = min(max(1, 2 * WORKING_SET // size), columns // size)
        groups = gains.topk(count, 1, largest=False, sorted=False).indices
        return (groups.unsqueeze(2) * size + torch.arange(size, device=gram.device)).flatten(1)

    def working_set(self, chosen: Tensor, gram: Tensor, pattern: NofM | None) -> "_WorkingSet":
        """Gather the weights in the `chosen` columns, (rows, set)."""
        weight, grow, drop = (tensor.gather(1, chosen) for tensor in (self.weight, self.grow, self.drop))
        if pattern is None:  # a row with too few kept, or pruned, weights has chosen some of the other kind twice
            grow[:, chosen.shape[1] // 2 :] = torch.inf
            drop[:, : chosen.shape[1] // 2] = torch.inf
        return _WorkingSet(chosen, weight, grow, drop, gram, None if pattern is None else pattern.of)


class _WorkingSet:
    """Working set of each row: the weights among which a round swaps; tensors are (rows, set).

    Args:
        chosen: int64, the columns of the weights.
        weight: float32, the weights.
        grow: float32, change of the error when a weight grows; infinite where it cannot.
        drop: float32, change of the error when a weight is dropped; infinite where it cannot.
        gram: float32, (in, in).
        size: M, if the weights are whole groups of M and pairs lie within a group; otherwise None.
    """

    def __init__(
        self, chosen: Tensor, weight: Tensor, grow: Tensor, drop: Tensor, gram: Tensor, size: int | None
    ) -> None:
        self.chosen, self.weight, self.grow, self.drop, self.gram = chosen, weight, grow, drop, gram
        self.moved = torch.zeros_like(weight, dtype=torch.bool)  # grown or dropped since the round began
        self._was_kept = drop.isfinite()
        self._rows = torch.arange(len(weight), device=weight.device)
        self._within = None
        if size is not None:
            columns, weights = chosen.view(len(chosen), -1, size), weight.view(len(weight), -1, size)
            self._within = gram[columns.unsqueeze(3), columns.unsqueeze(2)]  # (rows, groups, M to grow, M to drop)
            self._within.mul_(2 * weights.unsqueeze(3)).mul_(weights.unsqueeze(2))

    @property
    def change(self) -> Tensor:
        """Change of p since the round began, (rows, set)."""
        return torch.where(self._was_kept, self.weight, -self.weight) * self.moved

    def swap(self, smallest: Tensor, most_swaps: Tensor, steps: int) -> Tensor:
        """Swap the best pair of each row, again and again.

        Args:
            smallest: float32, (rows,), negative: a swap has to change its row's error by less than this.
            most_swaps: int64, (rows,), maximal number of swaps of each row.
            steps: maximal number of swaps of any row.

        Returns:
            The number of swaps of each row, int64 (rows,).
        """
        count = torch.zeros_like(most_swaps)
        for _ in range(steps):
            pair = self._best_of_two() if self._within is None else self._best_in_groups(self._within)
            active = (pair.change < smallest) & (count < most_swaps)
            rows = active.nonzero().squeeze(1)  # the only wait for a GPU in a step
            if not len(rows):
                break
            self._exchange(pair, active, rows)
            count += active
        return count

    def _cross(self, index: Tensor) -> Tensor:
        """2wᵢwⱼGᵢⱼ of the weight i at `index`, (rows,), in the set and each weight j of the set, (rows, set)."""
        gram = self.gram[self.chosen[self._rows, index].unsqueeze(1), self.chosen]
        return gram.mul_(self.weight).mul_(2 * self.weight[self._rows, index].unsqueeze(1))

    def _best_of_two(self) -> "_Pair":
        """Better of two pairs: the best weight to grow, or the best to drop, each with its best partner."""
        grow_alone, grow = self.grow.min(1)
        grow_cross = self._cross(grow)
        drop_more, drop_partner = (self.drop - grow_cross).min(1)
        drop_alone, drop = self.drop.min(1)
        drop_cross = self._cross(drop)
        grow_more, grow_partner = (self.grow - drop_cross).min(1)
        grow_first, drop_first = grow_alone + drop_more, drop_alone + grow_more
        second = drop_first < grow_first
        partner_cross = self._cross(torch.where(second, grow_partner, drop_partner))
        return _Pair(
            grow=torch.where(second, grow_partner, grow),
            drop=torch.where(second, drop, drop_partner),
            change=torch.where(second, drop_first, grow_first),
            grow_cross=torch.where(second.unsqueeze(1), partner_cross, grow_cross),
            drop_cross=torch.where(second.unsqueeze(1), drop_cross, partner_cross),
        )

    def _best_in_groups(self, within: Tensor) -> "_Pair":
        """Best of all pairs within groups of M; `within`: 2wᵢwⱼGᵢⱼ, (rows, groups, M to grow, M to drop)."""
        size = within.shape[2]
        grow_change, drop_change = (tensor.view(len(tensor), -1, size) for tensor in (self.grow, self.drop))
        change, pair = (grow_change.unsqueeze(3) + drop_change.unsqueeze(2)).sub_(within).flatten(1).min(1)
        grow, drop_member = pair // size, pair % size
        drop = grow - grow % size + drop_member
        return _Pair(grow, drop, change, self._cross(grow), self._cross(drop))

    def _exchange(self, pair: "_Pair", active: Tensor, rows: Tensor) -> None:
        """Swap a pair in the rows that are `active`, bool (rows,); `rows`: int64, their indices."""
        grow, drop = pair.grow, pair.drop
        cross_term = pair.grow_cross[self._rows, drop]
        # To undo the move of a weight changes the error by the negative of its move, plus the cross term of the pair.
        undo_grow = cross_term - self.grow[self._rows, grow]
        undo_drop = cross_term - self.drop[self._rows, drop]
        to_others = pair.drop_cross.sub_(pair.grow_cross).mul_(active.unsqueeze(1))
        self.grow.sub_(to_others)
        self.drop.add_(to_others)
        grow, drop = grow[rows], drop[rows]
        self.grow[rows, grow] = torch.inf
        self.drop[rows, drop] = torch.inf
        self.drop[rows, grow] = undo_grow[rows]
        self.grow[rows, drop] = undo_drop[rows]
        self.moved[rows, grow] ^= True
        self.moved[rows, drop] ^= True


@dataclass
class _Pair:
    """Pair of weights to swap in each row.

    Attributes:
        grow: int64, (rows,), index in the working set of the weight that grows.
        drop: int64, (rows,), index in the working set of the weight that is dropped.
        change: float32, (rows,), change of the error, negative where the swap lowers it.
        grow_cross: float32, (rows, set), 2wᵢwⱼGᵢⱼ of the growing weight with every weight of the set.
        drop_cross: float32, (rows, set), the same of the dropped weight.
    """

    grow: Tensor
    drop: Tensor
    change: Tensor
    grow_cross: Tensor
    drop_cross: Tensor
