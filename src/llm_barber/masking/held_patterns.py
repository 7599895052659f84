"""The N:M patterns that a weight matrix holds, and the pattern that it was pruned to."""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM

GROUP_SIZES = (2, 4, 8, 16, 32)


def fullest_group(nonzero: Tensor, size: int) -> int:
    """The most weights that any whole group of `size` consecutive inputs has; `nonzero` is bool, (out, in)."""
    covered = nonzero.shape[1] // size * size
    return int(nonzero[:, :covered].reshape(-1, size).sum(1, dtype=torch.int32).max())


def holds(pattern: NofM, nonzero: Tensor) -> bool:
    """Whether no whole group of M has more than N weights, and there is one; `nonzero` is bool, (out, in)."""
    return nonzero.shape[1] >= pattern.of and fullest_group(nonzero, pattern.of) <= pattern.kept


def held_patterns(nonzero: Tensor, zero_in_dense: Tensor | None = None) -> list[NofM]:
    """For each of some group sizes M the smallest N for which N:M holds, where that is less than M.

    Where M does not divide the row, the inputs after its last whole group have to be dense.

    Args:
        nonzero: bool, (out, in).
        zero_in_dense: bool, (out, in), zero before anything was pruned; None: not known, nothing.
    """
    columns = nonzero.shape[1]
    there = nonzero if zero_in_dense is None else nonzero | zero_in_dense
    held = []
    for size in GROUP_SIZES:
        # One group a row is a row, not a pattern.
        if columns > size and there[:, columns // size * size :].all():
            most = fullest_group(nonzero, size)
            if 1 <= most < size:
                held.append(NofM(most, size))
    return held


def find_pattern(nonzero: Tensor, zero_in_dense: Tensor) -> NofM | None:
    """The N:M that a linear was pruned to: the smallest M whose groups are all filled; None if it is unstructured.

    M is a power of two from 2 to 32.

    A sparse enough unstructured linear holds some N:M by chance, but leaves groups unfilled.

    Args:
        nonzero: bool, (out, in), the weights that are there.
        zero_in_dense: bool, (out, in); such a weight may have been kept.
    """
    rows, columns = nonzero.shape
    for pattern in held_patterns(nonzero, zero_in_dense):
        covered = pattern.covered(columns)
        kept_at_most = int(nonzero[:, :covered].sum()) + int(zero_in_dense[:, :covered].sum())
        if kept_at_most >= pattern.kept * (rows * covered // pattern.of):
            return pattern
    return None
