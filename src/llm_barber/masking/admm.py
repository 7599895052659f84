"""ADMM as in ALPS (NeurIPS 2024): choose mask and weights together.

A linear W has inputs with the Gram matrix G. ADMM seeks the V with the least ‖(V − W)x‖² under the pattern. It splits
V into B, which is dense and solves the least squares, and D, which holds the pattern. A growing penalty ρ pulls the
two together:

    B ← (WG − U + ρD)(G + ρI)⁻¹        D ← the largest of B + U/ρ        U ← U + ρ(B − D)

Columns are scaled so that the diagonal of G is one. ρ grows faster while the mask changes much; the iteration ends when
the mask has settled. Least squares then give the values of the kept weights (`least_squares.py`).
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
# (share, factor): weights whose mask changed are counted as a share of the kept weights. The penalty grows by the
# factor of the first share here that they exceed; if they exceed none, the mask has settled. As in ALPS' released
# program, which uses the last share only from its 33rd step on.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0003, 1.1))
SOLVING_STEPS = 10  # of conjugate gradient, for the values of the kept weights


@dataclass(frozen=True)
class ScaledGram:
    """A damped Gram matrix, scaled so that its diagonal is one, with its eigenvectors; all float32.

    Attributes:
        scale: (in,), the square roots of the damped diagonal.
        matrix: (in, in), the damped matrix, its rows and columns divided by `scale`.
        eigenvalues: (in,), at least 0.
        vectors: (in, in), the eigenvectors in columns.
    """

    scale: Tensor
    matrix: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    def inverse(self, penalty: float) -> Tensor:
        """(G + ρI)⁻¹ for the penalty ρ, (in, in)."""
        return (self.vectors / (self.eigenvalues + penalty)) @ self.vectors.t()


def scaled_gram(gram: Tensor, damping: float = DAMPING) -> ScaledGram:
    """Scale and decompose a Gram matrix, (in, in); linears that read the same inputs share the result."""
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
    scaled: ScaledGram | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune one linear.

    Args:
        weight: (out, in), any float dtype.
        gram: float32, (in, in), any scale.
        pattern: number of weights to prune.
        granularity: the set within which weights compete, unless the pattern is N:M; ALPS compares in the whole linear.
        damping: share of the mean diagonal that is added to the diagonal.
        scaled: `scaled_gram(gram, damping)`; None: computed here.

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
        target = solved + dual / penalty
        new_keep = initial_mask(target.abs(), pattern, granularity)
        sparse = target * new_keep
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
