"""ADMM in the manner of ALPS (NeurIPS 2024): mask and weights together, by splitting least squares and sparsity.

Of a linear W whose inputs have the Gram matrix G it seeks V with the least ‖(V − W)x‖² under the pattern. V is split
into B, which is dense and solves the least squares, and D, which holds the pattern; a penalty ρ that grows pulls them
together:

    B ← (WG − U + ρD)(G + ρI)⁻¹        D ← the largest of B + U/ρ        U ← U + ρ(B − D)

Columns are scaled so that G has a diagonal of ones. ρ grows the faster, the more the mask still changes, and all ends
when it does not. What the mask keeps is then solved for (`least_squares.py`).
"""

import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.least_squares import least_squares
from llm_barber.masking.pattern import Pattern

DAMPING = 0.01
FIRST_PENALTY = 0.1
LARGEST_PENALTY = 1e6
STEPS = 300
STEPS_BETWEEN_PENALTIES = 3
# Share of the kept weights that changed → factor of the penalty; below the last, the mask is settled (ALPS, 3.2).
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0003, 1.1))
SOLVING_STEPS = 10


def admm(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    granularity: Granularity = Granularity.LINEAR,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Args:
        weight: (out, in), any float dtype.
        gram: float32, (in, in), any scale.
        pattern: how many weights go.
        granularity: what competes, if the pattern is not N:M; ALPS compares in the whole linear.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        The keep mask, bool (out, in), and the weights, float32 (out, in), zero where pruned.

    Raises:
        ValueError: M does not divide the row.
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    scale = damped.diagonal().sqrt()
    matrix = damped / scale / scale.unsqueeze(1)
    dense = weight.float() * scale
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues.clamp_min_(0)
    product = dense @ matrix
    penalty = FIRST_PENALTY
    inverse = _inverse(eigenvalues, vectors, penalty)
    keep = initial_mask(dense.abs(), pattern, granularity)
    sparse, dual = dense * keep, torch.zeros_like(dense)
    for step in range(1, STEPS + 1):
        solved = (product - dual + penalty * sparse) @ inverse
        wanted = solved + dual / penalty
        new_keep = initial_mask(wanted.abs(), pattern, granularity)
        sparse = wanted * new_keep
        dual += penalty * (solved - sparse)
        if step % STEPS_BETWEEN_PENALTIES == 0:
            changed = (new_keep != keep).sum().item() / max(int(keep.sum()), 1)
            keep = new_keep
            factor = next((factor for share, factor in GROWTH if changed > share), None)
            if factor is None:
                break
            penalty = min(penalty * factor, LARGEST_PENALTY)
            inverse = _inverse(eigenvalues, vectors, penalty)
    return keep, least_squares(keep, weight, gram, steps=SOLVING_STEPS, damping=damping, start=sparse / scale)


def _inverse(eigenvalues: Tensor, vectors: Tensor, penalty: float) -> Tensor:
    """(G + ρI)⁻¹."""
    return (vectors / (eigenvalues + penalty)) @ vectors.t()
