"""Sums of gradients by the weights of a layer over the sequences of a step of tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_barber.masking.by_rows import add_scaled

# Gradients are summed in more bits, so that their order, and the number of processes, hardly ever show in the sum.
SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


class GradientSums:
    """Sums of gradients, in the dtype of `SUM_DTYPES`, in the order of the sequences.

    Args:
        weights: what gradients are taken by, of any shape, by name.
        dtype: of the layer. Gradients have it too, or float32 for float16.
    """

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._sums = {name: _empty_sum(weight, SUM_DTYPES[dtype]) for name, weight in weights.items()}
        self._empty = set(self._sums)

    def begin(self) -> None:
        """Begin the sums of another step."""
        self._empty = set(self._sums)

    def add(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Add a sequence's gradients times a scale, float32 (1,); weights that are not named get none."""
        for name, gradient in gradients.items():
            add_scaled(self._sums[name], gradient, scale, begins=name in self._empty)
            self._empty.discard(name)

    def finish(self) -> dict[str, Tensor]:
        """Return the sums, by name; the next step overwrites them."""
        for name in self._empty:
            self._sums[name].zero_()
        return self._sums


def _empty_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a sum, contiguous whatever the weight's strides are."""
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)
