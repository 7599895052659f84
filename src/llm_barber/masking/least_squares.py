"""Least squares on a fixed mask: the kept weights that make up best for the pruned ones.

Of a linear W whose inputs have the Gram matrix G = Σ x xᵀ, the values V, zero where pruned, with the least
V·G·V − 2 V·(WG − L) + λ‖V − W‖², row by row: the squared distance of its output from the target. L is the linear term
of `swaps.py`. Solved by preconditioned conjugate gradient, all rows at once: every step is one product with G.
"""

import torch
from torch import Tensor


def least_squares(
    keep: Tensor,
    weight: Tensor,
    gram: Tensor,
    linear_term: Tensor | None = None,
    steps: int = 30,
    damping: float = 0.01,
    start: Tensor | None = None,
) -> Tensor:
    """New values of the kept weights.

    Args:
        keep: bool, (out, in), True survives.
        weight: (out, in), the dense weights, which damping holds the values to.
        gram: float32, (in, in), symmetric, positive semidefinite; any scale.
        linear_term: float32, (out, in), L in the scale of `gram`; None: zero.
        steps: of conjugate gradient.
        damping: λ, as a share of the mean diagonal of `gram`.
        start: float32, (out, in), where the search starts; None: at the dense weights.

    Returns:
        float32, (out, in), zero where pruned.
    """
    dense = weight.float()
    diagonal = gram.diagonal()
    strength = damping * diagonal.mean()
    preconditioner = 1 / (diagonal + strength).clamp_min(torch.finfo(torch.float32).tiny)
    kept = keep.to(torch.float32)
    values = (dense if start is None else start) * kept
    # The gradient of half the objective, negated: (WG − L + λW) − (VG + λV), where a weight may move.
    missing = dense - values
    target = torch.addcmul(missing @ gram, missing, strength)
    residual = (target if linear_term is None else target - linear_term) * kept
    prepared = residual * preconditioner
    direction = prepared.clone()
    size = (residual * prepared).sum(1, keepdim=True)
    for _ in range(steps):
        product = torch.addcmul(direction @ gram, direction, strength) * kept
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)  # a row that is solved stays
        values.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        torch.mul(residual, preconditioner, out=prepared)
        following = (residual * prepared).sum(1, keepdim=True)
        direction = torch.addcmul(prepared, torch.where(size > 0, following / size, 0), direction)
        size = following
    return values


def squared_distance(values: Tensor, weight: Tensor, gram: Tensor, linear_term: Tensor | None = None) -> Tensor:
    """p·G·p − 2 p·L with p = W − V: each row's squared distance from its target, less that of the dense weights.

    Args:
        values: (out, in), zero where pruned.
        weight: (out, in), the dense weights.
        gram: float32, (in, in).
        linear_term: float32, (out, in), L in the scale of `gram`; None: zero.

    Returns:
        float32, (out,), in the scale of `gram`.
    """
    missing = weight.float() - values.float()
    moment = missing @ gram
    return (missing * (moment if linear_term is None else moment - 2 * linear_term)).sum(1)
