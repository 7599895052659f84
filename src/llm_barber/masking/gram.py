"""Gram matrices of inputs, Σ x xᵀ, summed over the calibration sequences in float32."""

import torch
from torch import Tensor

from llm_barber.masking.products import exact_half_products
from llm_barber.masking.statistics import RunningSums, new_count

# A Gram matrix is cut into this many panels of rows; a panel has at least this many rows.
PANELS, SMALLEST_PANEL = 8, 64


def panels(features: int) -> list[slice]:
    """Cut the rows of a Gram matrix, (features, features), into panels.

    The matrix is symmetric: each panel is summed only from its diagonal block to the right. Eight panels take 9/16 of
    the products; `mirror` copies the rest.
    """
    size = max(SMALLEST_PANEL, -(-features // PANELS))
    return [slice(first, min(first + size, features)) for first in range(0, features, size)]


def add_products(total: Tensor, values: Tensor) -> None:
    """Add Σ x xᵀ over the rows x of `values`, (tokens, in), to the panels of `total`, (in, in); float32."""
    for rows in panels(len(total)):
        total[rows, rows.start :].addmm_(values[:, rows].t(), values[:, rows.start :])


def gram_flops(tokens: float, features: int) -> float:
    """Count the floating-point operations of `add_products`."""
    products: int = sum((rows.stop - rows.start) * (features - rows.start) for rows in panels(features))
    return 2 * tokens * products


def mirror(total: Tensor) -> Tensor:
    """Complete a sum of `add_products`, (in, in), in place: copy the panels below the diagonal."""
    for rows in panels(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].t()
    return total


class GramMatrix(RunningSums):
    """H = 2/n · Σ x xᵀ over all tokens of n sequences (SparseGPT, arXiv 2301.00774).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in, in).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, features, device=device)
        self.sequences = new_count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences; products are float32, since rounded products are not positive definite."""
        with exact_half_products(inputs.dtype):
            for sequence in inputs:
                add_products(self.total, sequence.float())
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """H, twice the mean of a sequence's Σ x xᵀ, float32 (in, in)."""
        return mirror(self.total * (2 / self.sequences.item()))


class TargetMoments(RunningSums):
    """Moments of inputs that give a linear's squared error on sparse inputs from a target.

    `gram` is Σ x xᵀ / n and `difference` is Σ (x − x′) xᵀ / n over all n tokens, both float32 (in, in); x is an input
    in the sparse model, x′ the same input in the dense model. A target between the outputs on x (mix 0) and on x′
    (mix 1) has the linear term L = mix · W · difference of `swaps.py`.

    `squared` and `crossed` are the sums, Σ x xᵀ (its panels) and Σ x′ xᵀ; `crossed` is None where x′ is x.
    """

    def __init__(self, features: int, device: torch.device, crossed: bool = True) -> None:
        self.squared = torch.zeros(features, features, device=device)
        self.crossed = torch.zeros_like(self.squared) if crossed else None
        self.tokens = new_count()

    def update(self, inputs: Tensor, dense_inputs: Tensor | None) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in), x.
            dense_inputs: (sequences, tokens, in), x′; None where `crossed` is False: they equal `inputs`.
        """
        with exact_half_products(inputs.dtype):
            for index, sequence in enumerate(inputs):
                values = sequence.float()
                add_products(self.squared, values)
                if dense_inputs is not None and self.crossed is not None:
                    self.crossed.addmm_(dense_inputs[index].float().t(), values)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ / n, float32 (in, in)."""
        return mirror(self.squared / self.tokens.item())

    @property
    def difference(self) -> Tensor:
        """Σ (x − x′) xᵀ / n, float32 (in, in)."""
        if self.crossed is None:
            return torch.zeros_like(self.squared)
        return mirror(self.squared.clone()).sub_(self.crossed).div_(self.tokens.item())
