"""The N:M patterns that a weight matrix holds, and the pattern that it was pruned to."""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM

GROUP_SIZES = (2, 4, 8, 16, 32)


def fullest_group(nonzero: Tensor, size: int) -> int:
    """Largest number of True in any whole group of `size` consecutive inputs of `nonzero`, bool (out, in)."""
    covered = nonzero.shape[1] // size * size
    return int(nonzero[:, :covered].reshape(-1, size).sum(1, dtype=torch.int32).max())


def holds(pattern: NofM, nonzero: Tensor) -> bool:
    """Test that each whole group of M has at most N weights, and that there is one; `nonzero`: (out, in)."""
    return nonzero.shape[1] >= pattern.of and fullest_group(nonzero, pattern.of) <= pattern.kept


def find_patterns(nonzero: Tensor, zero_in_dense: Tensor | None = None) -> list[NofM]:
    """Patterns that hold: for each M of `GROUP_SIZES` the smallest N, if it is less than M.

    Where M does not divide the row, its tail has to be dense.

    Args:
        nonzero: bool, (out, in).
        zero_in_dense: bool, (out, in), weights that are zero in the dense model; None: not known, taken as none.
    """
    columns = nonzero.shape[1]
    kept = nonzero if zero_in_dense is None else nonzero | zero_in_dense
    held = []
    for size in GROUP_SIZES:
        # If a row is a single group, its number of weights is no pattern.
        if columns > size and kept[:, columns // size * size :].all():
            kept_at_most = fullest_group(nonzero, size)
            if 1 <= kept_at_most < size:
                held.append(NofM(kept_at_most, size))
    return held


def find_pattern(nonzero: Tensor, zero_in_dense: Tensor) -> NofM | None:
    """N:M that a linear was pruned to: the smallest M of `GROUP_SIZES` with full groups, or None.

    A sparse unstructured linear may hold some N:M by chance, but some of its groups have fewer than N weights.

    Args:
        nonzero: bool, (out, in), the weights that are not zero.
        zero_in_dense: bool, (out, in), weights that are zero in the dense model, and may have been kept.
    """
    rows, columns = nonzero.shape
    for pattern in find_patterns(nonzero, zero_in_dense):
        covered = pattern.covered(columns)
        kept_at_most = int(nonzero[:, :covered].sum()) + int(zero_in_dense[:, :covered].sum())
        if kept_at_most >= pattern.kept * (rows * covered // pattern.of):
            return pattern
    return None
