"""ADMM in the manner of ALPS (NeurIPS 2024): mask and weights together, by splitting least squares and sparsity.

Of a linear W whose inputs have the Gram matrix G it seeks V with the least ‖(V − W)x‖² under the pattern. V is split
into B, which is dense and solves the least squares, and D, which holds the pattern; a penalty ρ that grows pulls them
together:

    B ← (WG − U + ρD)(G + ρI)⁻¹        D ← the largest of B + U/ρ        U ← U + ρ(B − D)

Columns are scaled so that G has a diagonal of ones. ρ grows the faster, the more the mask still changes, and all ends
when it does not. What the mask keeps is then solved for (`least_squares.py`).
"""

from dataclasses import dataclass

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
# Share of the kept weights that changed → factor of the penalty; below the last, the mask is settled. As in ALPS'
# released program, which settles for the last one only from its 33rd step on.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0003, 1.1))
SOLVING_STEPS = 10


@dataclass(frozen=True)
class ScaledGram:
    """A damped Gram matrix, divided by `scale`, (in,), in rows and columns so that its diagonal is one; eigenvectors.

    `matrix` and `vectors` are (in, in), `eigenvalues` (in,), all float32.
    """

    scale: Tensor
    matrix: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    def inverse(self, penalty: float) -> Tensor:
        """(G + ρI)⁻¹."""
        return (self.vectors / (self.eigenvalues + penalty)) @ self.vectors.t()


def scaled_gram(gram: Tensor, damping: float = DAMPING) -> ScaledGram:
    """What all linears that read the same inputs share."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    scale = damped.diagonal().sqrt()
    matrix = damped / scale / scale.unsqueeze(1)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return ScaledGram(scale, matrix, eigenvalues.clamp_min_(0), vectors)


def admm(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    granularity: Granularity = Granularity.LINEAR,
    damping: float = DAMPING,
    scaled: "ScaledGram | None" = None,
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Args:
        weight: (out, in), any float dtype.
        gram: float32, (in, in), any scale.
        pattern: how many weights go.
        granularity: what competes, if the pattern is not N:M; ALPS compares in the whole linear.
        damping: share of the mean diagonal that is added to the diagonal.
        scaled: `scaled_gram(gram, damping)`, where the caller has it already.

    Returns:
        The keep mask, bool (out, in), and the weights, float32 (out, in), zero where pruned.
    """
    scaled = scaled_gram(gram, damping) if scaled is None else scaled
    dense = weight.float() * scaled.scale
    product = dense @ scaled.matrix
    penalty = FIRST_PENALTY
    inverse = scaled.inverse(penalty)
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
            inverse = scaled.inverse(penalty)
    return keep, least_squares(keep, weight, gram, steps=SOLVING_STEPS, damping=damping, start=sparse / scaled.scale)
