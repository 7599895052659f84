"""Least squares on a fixed mask: values of the kept weights that best make up for the pruned weights.

A linear W has inputs with the Gram matrix G = Σ x xᵀ. The values V are zero where pruned and minimise, in each row,

    V·G·V − 2 V·(WG − L) + λ‖V − W‖²

which is, without the damping λ, the squared distance of the output from its target. L is the linear term of `swaps.py`.
Preconditioned conjugate gradient solves all rows at once: each step is one product with G.
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
    """Solve for the values of the kept weights.

    Args:
        keep: bool, (out, in), True survives.
        weight: (out, in), the dense weights; damping pulls the values towards them.
        gram: float32, (in, in), symmetric, positive semidefinite; any scale.
        linear_term: float32, (out, in), L in the scale of `gram`; None: zero.
        steps: number of conjugate-gradient steps.
        damping: λ, as a share of the mean diagonal of `gram`.
        start: float32, (out, in), values to start from; None: the dense weights.

    Returns:
        float32, (out, in), zero where pruned.
    """
    dense = weight.float()
    diagonal = gram.diagonal()
    strength = damping * diagonal.mean()
    preconditioner = 1 / (diagonal + strength).clamp_min(torch.finfo(torch.float32).tiny)
    kept = keep.to(torch.float32)
    values = (dense if start is None else start) * kept
    # The negative gradient of half the objective, (WG − L + λW) − (VG + λV), where weights are kept.
    missing = dense - values
    target = torch.addcmul(missing @ gram, missing, strength)
    residual = (target if linear_term is None else target - linear_term) * kept
    prepared = residual * preconditioner
    direction = prepared.clone()
    size = (residual * prepared).sum(1, keepdim=True)
    for _ in range(steps):
        product = torch.addcmul(direction @ gram, direction, strength) * kept
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)  # a solved row stays
        values.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        torch.mul(residual, preconditioner, out=prepared)
        following = (residual * prepared).sum(1, keepdim=True)
        direction = torch.addcmul(prepared, torch.where(size > 0, following / size, 0), direction)
        size = following
    return values


def squared_distance(values: Tensor, weight: Tensor, gram: Tensor, linear_term: Tensor | None = None) -> Tensor:
    """Squared distance of each row's output from its target, less that of the dense weights.

    The distance is p·G·p − 2 p·L with p = W − V.

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
