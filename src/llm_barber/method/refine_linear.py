"""Refine the mask and the weights of one linear: exact swaps, then least squares.

Held-out windows decide how far each step goes.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llm_barber.masking.gram import TargetMoments
from llm_barber.masking.least_squares import least_squares, squared_distance
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.swaps import swap_pairs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.settings.refining import RefineSettings

# Shares of the most swaps after which a stage ends: there, held-out windows measure each row's error.
STAGE_ENDS = (0.25, 0.5, 1.0)
# From strong to weak: each damping starts from the solution of the one before, until the held-out error rises.
DAMPINGS = (0.3, 0.1, 0.03, 0.01)
STEPS_A_DAMPING = 10
UNGUARDED_DAMPING, UNGUARDED_STEPS = 0.03, 30


@dataclass(frozen=True)
class Objective:
    """Gram matrix, (in, in), and mix · (x − x′)xᵀ, (in, in), from which a weight's linear term follows."""

    gram: Tensor
    difference: Tensor | None

    @classmethod
    def of(cls, moments: TargetMoments, mix: float) -> "Objective | None":
        """Objective of the windows that the moments are sums over.

        None: there is no window, or no input that is not zero, as of an expert without tokens.
        """
        if not moments.tokens or not moments.squared.any():
            return None
        return cls(moments.gram, mix * moments.difference if mix else None)

    def linear_term(self, weight: Tensor) -> Tensor | None:
        """The linear term of `swap_pairs` and `least_squares`."""
        return None if self.difference is None else weight.float() @ self.difference

    def error(self, values: Tensor, weight: Tensor) -> Tensor:
        """Squared distance of each row from its target, float32 (out,), less that of the dense weights."""
        return squared_distance(values, weight, self.gram, self.linear_term(weight))


def swap_stages(swaps: int, guarded: bool) -> tuple[int, ...]:
    """Most swaps of a row in each stage.

    With held-out windows (`guarded`), a stage ends where they measure the errors.

    Example: swaps=100, guarded -> (25, 25, 50); swaps=2, guarded -> (1, 1), since a stage has at least one swap.
    """
    if not swaps:
        return ()
    if not guarded:
        return (swaps,)
    ends = [math.ceil(share * swaps) for share in STAGE_ENDS]
    return tuple(end - start for start, end in pairwise([0, *ends]) if end > start)


def refine_linear(
    pruned: PrunedLinear,
    weight: Tensor,
    training: Objective,
    held_out: Objective | None,
    settings: RefineSettings,
) -> PrunedLinear:
    """Swap kept and pruned weights of a linear, then solve least squares for the kept ones.

    Args:
        pruned: mask and values to start from.
        weight: dense weights, (out, in).
        training: objective on the training windows.
        held_out: objective on the held-out windows, which decide how far each step goes; None: there are none.
        settings: most swaps of a row; whether least squares are solved.
    """
    linear_term = training.linear_term(weight)
    keep = pruned.keep
    swaps = settings.swaps_of(pruned.pattern)
    if swaps:
        keep = _swap(pruned, weight, training.gram, linear_term, held_out, swaps)
    values = pruned.values
    if settings.solve:
        free = replace(pruned, keep=keep).free
        values = _solve(free, weight, training.gram, linear_term, held_out).to(pruned.values.dtype)
    return replace(pruned, values=values).with_mask(keep)


def _swap(
    pruned: PrunedLinear,
    weight: Tensor,
    gram: Tensor,
    linear_term: Tensor | None,
    held_out: Objective | None,
    swaps: int,
) -> Tensor:
    """Keep mask after swaps; of each row, that of the stage with the lowest held-out error."""
    keep = best = pruned.keep
    if held_out is None:
        return swap_pairs(keep, weight, gram, swaps, linear_term, pruned.pattern, pruned.fixed)[0]
    lowest = held_out.error(apply_mask(weight, keep), weight)
    for stage_swaps in swap_stages(swaps, guarded=True):
        keep, count = swap_pairs(keep, weight, gram, stage_swaps, linear_term, pruned.pattern, pruned.fixed)
        error = held_out.error(apply_mask(weight, keep), weight)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = torch.where(better.unsqueeze(1), keep, best)
        if not count.any():
            break
    return best


def _solve(
    keep: Tensor, weight: Tensor, gram: Tensor, linear_term: Tensor | None, held_out: Objective | None
) -> Tensor:
    """Least-squares values, float32 (out, in), with the damping whose held-out error is lowest."""
    if held_out is None:
        return least_squares(keep, weight, gram, linear_term, UNGUARDED_STEPS, UNGUARDED_DAMPING)
    best = values = weight.float() * keep
    lowest = held_out.error(values, weight).sum()
    for damping in DAMPINGS:
        values = least_squares(keep, weight, gram, linear_term, STEPS_A_DAMPING, damping, values)
        error = held_out.error(values, weight).sum()
        if not error < lowest:  # NaN is not better
            break
        best, lowest = values, error
    return best
