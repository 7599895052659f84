"""How far a layer's output is from what it should be: squares, in which channels that are always huge count for less.

Some models keep a few channels that are hundreds of times as large as the others, for every token (Gemma 3: one or two
of 640 have 90 % of the squares). The plain squared distance is that of these channels, and what lowers it can ruin all
the others; what reads the states normalises them, and scales such channels down.
"""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from llm_barber.model.gradients import mean_squares

HUGE = 30.0  # times the median channel's square: larger channels count as if they were that large

LEAST = 1e-6  # that a channel counts for: most may be zero


@dataclass(frozen=True)
class Distance:
    """Σ over tokens and channels of weight · (y − target)².

    `weights`: of the channels, float32, (hidden,); 1 where a channel is not huge.
    """

    weights: Tensor

    @classmethod
    def of(cls, squares: Tensor) -> "Distance":
        """From the channels' usual squares, (hidden,), at least 0, up to a factor (`usual_squares`)."""
        bound = torch.maximum(HUGE * squares.median(), LEAST * squares.max())
        if bound == 0:  # nothing to compare with
            return cls(torch.ones_like(squares, dtype=torch.float32))
        return cls((bound / squares.clamp_min(bound)).float())

    def errors(self, target: Tensor, output: Tensor) -> Tensor:
        """The mean over tokens and channels of each sequence: (sequences, tokens, hidden) → float32 (sequences,)."""
        return mean_squares((target.float() - output.float()) * self.weights.sqrt())

    def gradient(self, target: Tensor, output: Tensor) -> Tensor:
        """By the output, of half the sum: float32, (sequences, tokens, hidden)."""
        return (output.float() - target.float()) * self.weights


def usual_squares(targets: Tensor) -> Tensor:
    """The square of each channel's median size in a sequence, summed over sequences.

    The median, since single tokens, the first of a text above all, are huge in channels that are small otherwise.

    Args:
        targets: (sequences, tokens, hidden).

    Returns:
        float64, (hidden,): rounded to float32, sums over batches and processes are the same in any order.
    """
    return _medians(targets.abs()).double().square().sum(0)


def _medians(sizes: Tensor) -> Tensor:
    """The lower median over tokens: (sequences, tokens, hidden), at least 0 → (sequences, hidden).

    On CPUs numpy looks for it, in the bits: those of numbers from 0 up have their order, and it partitions short
    integers nearly ten times as fast as `torch.median` works.
    """
    if sizes.device.type != "cpu":
        return sizes.median(1).values
    bits = sizes.view({2: torch.int16, 4: torch.int32}[sizes.element_size()])
    middle = (sizes.shape[1] - 1) // 2
    # One by one: so they are turned fast.
    found = [numpy.partition(one.t().contiguous().numpy(), middle)[:, middle].copy() for one in bits]
    return torch.stack([torch.from_numpy(one) for one in found]).view(sizes.dtype)
