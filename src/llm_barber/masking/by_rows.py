"""Add matrices to a large sum of more bits, or multiply the sum by them, in place.

Example: bfloat16 gradients are added to a float32 sum. A CPU converts them in a temporary array, which stays in its
cache if it has only a few rows. A GPU converts as it reads: it takes whole matrices. Scales stay on the GPU, so that
nothing waits for it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS = 2**17  # of a matrix that a CPU takes at a time


def add_scaled(total: Tensor, values: Tensor, scale: Tensor, begins: bool) -> None:
    """Add values, times a scale, to a sum.

    Args:
        total: (out, in), float32 or float64.
        values: (out, in), of at most as many bits.
        scale: float32, (1,).
        begins: the sum begins with these values; its numbers so far are not read.
    """
    if total.device.type != "cpu":
        if begins:
            total.zero_()
        total.addcmul_(values, scale)
        return
    factor = scale.item()
    for part, added in _by_rows(total, values):
        if begins:
            part.copy_(added).mul_(factor)
        else:
            part.add_(added, alpha=factor)


def add_squares(total: Tensor, values: Tensor, scale: Tensor) -> None:
    """Add (scale · values)² to a sum.

    Args:
        total: (out, in), float32.
        values: (out, in), of at most as many bits.
        scale: float32, ().
    """
    if total.device.type != "cpu":
        scaled = values.float() * scale
        total.addcmul_(scaled, scaled)
        return
    factor = scale.item() ** 2
    for part, added in _by_rows(total, values):
        converted = added.float()
        part.addcmul_(converted, converted, value=factor)


def multiply(total: Tensor, values: Tensor) -> Tensor:
    """Multiply a sum, (out, in), by values, (out, in), of at most as many bits; return the sum."""
    if total.device.type != "cpu":
        return total.mul_(values)
    for part, factors in _by_rows(total, values):
        part.mul_(factors)
    return total


def _by_rows(total: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both matrices, a few rows at a time."""
    rows = max(1, NUMBERS // max(1, total.shape[1]))
    return zip(torch.split(total, rows), torch.split(values, rows), strict=True)
