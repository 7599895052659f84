"""Sums over the calibration sequences of squared gradients of weights: as they are, and by rows and columns."""

import torch
from torch import Tensor

from llm_barber.gpu.steps import add_squares as add_squares_in_turn
from llm_barber.masking.by_rows import add_squares
from llm_barber.masking.products import exact_half_products
from llm_barber.masking.statistics import RunningSums, new_count

SEQUENCES_TOGETHER, GRADIENT_BYTES = 4, 2**30  # a GPU holds gradients of so many sequences, or so many bytes, at a time


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
        if inputs.device.type == "cpu":
            for sequence, gradient, scaling in zip(inputs, output_gradient, scale, strict=True):
                _add_squares_by_rows(self.total, sequence, gradient, scaling, factor)
        else:
            itemsize = 4 if inputs.dtype == torch.float16 else inputs.element_size()
            size = gradients_together(self.total.numel(), itemsize)
            for part in (slice(first, first + size) for first in range(0, len(inputs), size)):
                _add_squares_at_once(self.total, inputs[part], output_gradient[part], scale[part], factor)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean squared gradient, float32 (out, in)."""
        return self.total / self.sequences.item()


def _add_squares_by_rows(total: Tensor, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float) -> None:
    """Add a sequence's squared gradient to `total`, (out, in), as a CPU is fastest: a few rows at a time."""
    add_squares(total, weight_gradients(output_gradient, inputs), scale * factor)


def _add_squares_at_once(total: Tensor, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float) -> None:
    """Add squared gradients of some sequences to `total`, (out, in), as a GPU is fastest: in one pass over all."""
    add_squares_in_turn(total, weight_gradients(output_gradient, inputs), scale * factor)


def gradients_together(weights: int, itemsize: int) -> int:
    """Number of sequences whose gradients by so many weights, of this itemsize, a GPU holds and adds up at a time."""
    return max(1, min(SEQUENCES_TOGETHER, GRADIENT_BYTES // (weights * itemsize)))


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
