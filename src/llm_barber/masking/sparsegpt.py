"""SparseGPT (arXiv 2301.00774): prune column by column and let the columns to come make up for the error.

It gives a keep mask and updated weights. It follows the paper's algorithm.
"""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.masking.selection import lowest, rank_within

DAMPING = 0.01
MAXIMAL_DAMPING_TRIES = 8
# Columns after which the rest of their block is brought up to date at once: a product of matrices is far faster than
# as many of vectors.
STRIDE = 32


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    damping: float = DAMPING,
    block_size: int = 128,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Args:
        weight: (out, in), any float dtype.
        gram: (in, in), float32, see `statistics.GramMatrix`.
        pattern: unstructured sparsity is met in every block of columns, or over the linear; N:M in every whole group.
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold while the matrix is not
            positive definite.
        block_size: columns whose mask is chosen together; rounded up to a whole number of groups of M.
        factor: `inverse_factor(gram, damping)`, where the caller has it already.

    Returns:
        The keep mask, bool (out, in), and the updated weights, float32 (out, in), zero where pruned.
    """
    columns = weight.shape[1]
    if isinstance(pattern, NofM):
        block_size = -(-block_size // pattern.of) * pattern.of
    # Transposed, so that the column being pruned and those to come are contiguous.
    values = weight.float().t().clone()
    values[gram.diagonal() == 0] = 0
    factor = inverse_factor(gram, damping) if factor is None else factor
    keep = torch.empty_like(values, dtype=torch.bool)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        own = values[start:stop], factor[start:stop, start:stop]
        keep[start:stop], errors = _prune_block(*own, pattern, _count(pattern, len(weight), start, stop))
        values[stop:] -= factor[start:stop, stop:].t() @ errors
    return keep.t().contiguous(), values.t().contiguous()


def _count(pattern: Pattern, rows: int, start: int, stop: int) -> int:
    """Weights to prune in some columns, of all rows together; not for N:M."""
    if isinstance(pattern, NofM):
        return 0
    if pattern.over_linear:
        return pattern.nearest(rows * stop) - pattern.nearest(rows * start)
    return pattern.pruned(rows * (stop - start))


def _prune_block(values: Tensor, factor: Tensor, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place; returns its keep mask and the errors to pass on, both (columns, out).

    Without N:M, `count` weights go.
    """
    diagonal = factor.diagonal()
    if isinstance(pattern, NofM):
        keep = torch.ones_like(values, dtype=torch.bool)
        covered = pattern.covered(len(values))
    else:
        saliency = (values / diagonal.unsqueeze(1)).square()
        keep = ~lowest(saliency.t().reshape(1, -1), count).view(values.shape[1], -1).t()
    errors = torch.empty_like(values)
    going = (~keep) / diagonal.unsqueeze(1)  # what makes errors of values: 0 where they stay
    stride = -(-STRIDE // pattern.of) * pattern.of if isinstance(pattern, NofM) else STRIDE
    for first in range(0, len(values), stride):
        last = min(first + stride, len(values))
        for column in range(first, last):
            if isinstance(pattern, NofM) and column % pattern.of == 0 and column < covered:
                group = slice(column, column + pattern.of)
                saliency = (values[group] / diagonal[group].unsqueeze(1)).square()
                keep[group] = rank_within(saliency.t()).t() >= pattern.of - pattern.kept
                going[group] = (~keep[group]) / diagonal[group].unsqueeze(1)
            torch.mul(values[column], going[column], out=errors[column])
            values[column + 1 : last].addr_(factor[column, column + 1 : last], errors[column], alpha=-1)
        values[last:] -= factor[first:last, last:].t() @ errors[first:last]
    values.masked_fill_(~keep, 0)
    return keep, errors


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor of the damped inverse Gram matrix, (in, in), with the damping that it takes."""
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1  # a dead input: its weights are zeroed, any value does
    step = damping * diagonal.mean()
    for _ in range(MAXIMAL_DAMPING_TRIES):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        step = step * 10
    # So far from positive definite that only the diagonal can be trusted.
    return torch.diag(diagonal.clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt())
