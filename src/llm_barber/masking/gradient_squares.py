"""Sums over the calibration sequences of squared gradients of weights: as they are, and by rows and columns."""

import torch
from torch import Tensor

from llm_barber.masking.by_rows import add_squares
from llm_barber.masking.products import exact_half_products
from llm_barber.masking.statistics import RunningSums, new_count


class GradientSquares(RunningSums):
    """Mean over sequences of the squared gradient of a weight (arXiv 2408.10631).

    The gradient of one sequence is `output_gradientᵀ · inputs`; it is squared before sequences are added.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self.sequences = new_count()

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float = 1.0) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in).
            output_gradient: (sequences, tokens, out), each sequence divided by its `scale` and by `factor`.
            scale: (sequences,), float32, powers of two.
            factor: the same for all sequences.
        """
        for sequence, gradient, scaling in zip(inputs, output_gradient, scale, strict=True):
            add_squares(self.total, weight_gradients(gradient, sequence), scaling * factor)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean squared gradient, float32 (out, in)."""
        return self.total / self.sequences.item()


def weight_gradients(output_gradients: Tensor, inputs: Tensor) -> Tensor:
    """Gradients by weights, (…, out, in), from gradients by outputs, (…, tokens, out), and inputs, (…, tokens, in).

    They have the gradients' dtype, or float32 for float16, since a sum over tokens can exceed the largest float16,
    65504.
    """
    if output_gradients.dtype == torch.float16:
        with exact_half_products(torch.float16):
            return weight_gradients(output_gradients.float(), inputs.float())
    return output_gradients.transpose(-2, -1) @ inputs


class FisherSums(RunningSums):
    """Fisher information of a linear's weights, summed over its columns and over its rows.

    The information of a weight is Σ (g x)² over tokens, with g the gradient of the loss by its output and x its input.
    `rows`, float64 (out,), is the sum over inputs, Σ g² ‖x‖²; `columns`, float64 (in,), the sum over outputs,
    Σ ‖g‖² x².
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.rows = torch.zeros(shape[0], device=device, dtype=torch.float64)
        self.columns = torch.zeros(shape[1], device=device, dtype=torch.float64)

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in).
            output_gradient: (sequences, tokens, out), each sequence divided by its `scale`.
            scale: (sequences,), float32.
        """
        for sequence, gradient, factor in zip(inputs, output_gradient, scale, strict=True):
            x, g = sequence.float().square(), (gradient.float() * factor).square()
            self.rows += x.sum(1) @ g
            self.columns += g.sum(1) @ x
