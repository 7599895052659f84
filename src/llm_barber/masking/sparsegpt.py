"""SparseGPT (arXiv 2301.00774): prune column by column; later columns make up for the error.

The algorithm is the paper's. It gives a keep mask and updated weights.
"""

import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.masking.selection import lowest, rank_within

DAMPING = 0.01
MAXIMAL_DAMPING_TRIES = 8
# The rest of a block is brought up to date after this many columns: a product of matrices is far faster than as many
# products of vectors.
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
        gram: (in, in), float32, see `gram.GramMatrix`.
        pattern: unstructured sparsity holds in every block of columns, or over the linear; N:M in every whole group.
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold while the matrix is not
            positive definite.
        block_size: columns whose mask is chosen together; rounded up to a whole number of groups of M.
        factor: `inverse_factor(gram, damping)`; None: computed here.

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
        count = _block_count(pattern, len(weight), start, stop)
        keep[start:stop], errors = _prune_block(values[start:stop], factor[start:stop, start:stop], pattern, count)
        values[stop:] -= factor[start:stop, stop:].t() @ errors
    return keep.t().contiguous(), values.t().contiguous()


def _block_count(pattern: Pattern, rows: int, start: int, stop: int) -> int:
    """Number of weights to prune in the columns from `start` to `stop`, of all rows together; 0 for N:M."""
    if isinstance(pattern, NofM):
        return 0
    if pattern.over_linear:
        return pattern.nearest(rows * stop) - pattern.nearest(rows * start)
    return pattern.pruned(rows * (stop - start))


def _prune_block(values: Tensor, factor: Tensor, pattern: Pattern, count: int) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place.

    Args:
        values: float32, (columns, out), the weights of the block.
        factor: float32, (columns, columns), the block of the inverse's factor.
        pattern: the pattern of the linear.
        count: number of weights to prune in the block; unused for N:M.

    Returns:
        The keep mask, and the errors that the later columns make up for; both (columns, out).
    """
    diagonal = factor.diagonal()
    if isinstance(pattern, NofM):
        keep = torch.ones_like(values, dtype=torch.bool)
        covered = pattern.covered(len(values))
    else:
        saliency = (values / diagonal.unsqueeze(1)).square()
        keep = ~lowest(saliency.t().reshape(1, -1), count).view(values.shape[1], -1).t()
    errors = torch.empty_like(values)
    error_factor = (~keep) / diagonal.unsqueeze(1)  # error of a weight / its value; 0 where it is kept
    stride = -(-STRIDE // pattern.of) * pattern.of if isinstance(pattern, NofM) else STRIDE
    for first in range(0, len(values), stride):
        last = min(first + stride, len(values))
        for column in range(first, last):
            if isinstance(pattern, NofM) and column % pattern.of == 0 and column < covered:
                group = slice(column, column + pattern.of)
                saliency = (values[group] / diagonal[group].unsqueeze(1)).square()
                keep[group] = rank_within(saliency.t()).t() >= pattern.of - pattern.kept
                error_factor[group] = (~keep[group]) / diagonal[group].unsqueeze(1)
            torch.mul(values[column], error_factor[column], out=errors[column])
            values[column + 1 : last].addr_(factor[column, column + 1 : last], errors[column], alpha=-1)
        values[last:] -= factor[first:last, last:].t() @ errors[first:last]
    values.masked_fill_(~keep, 0)
    return keep, errors


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor of the damped inverse Gram matrix, (in, in); damping grows until it exists."""
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1  # a dead input: its weights are set to zero, so any value will do
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
    # The matrix is far from positive definite: only its diagonal can be trusted.
    return torch.diag(diagonal.clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt())
