"""Squared distance of a layer's output from its target, in which huge channels and huge tokens count for less.

Huge channels: some models keep a few channels that are hundreds of times as large as the others, for every token (Gemma
3: one or two of 640 hold 90 % of the squares). The plain squared distance is that of these channels, and steps that
lower it can ruin all other channels. The norm in front of the next linears scales such channels down.

Huge tokens: in most models one token of a window, mostly the first, has states that are a hundred times as large as
the others' (an attention sink). Its error was made in the layer that writes it, later layers hand it on, and it hides
whether the other tokens come nearer. So held-out windows count it for less. Gradients do not: Adam scales the steps of
each weight by themselves (`docs/method/tuning.md` has the measurements).
"""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

HUGE = 30.0  # times the median channel's square: larger channels count as if they were that large
# Times the median token's square: on held-out windows, larger tokens count as if they were that large.
HUGE_TOKEN = 10.0

LEAST = 1e-6  # least weight of a channel or token: where most are zero, the median is no measure


@dataclass(frozen=True)
class Distance:
    """Σ over tokens and channels of weight · (y − target)².

    `weights`: of the channels, float32, (hidden,); 1 where a channel is not huge.
    """

    weights: Tensor

    @classmethod
    def of(cls, squares: Tensor) -> "Distance":
        """Weights from the channels' usual squares, (hidden,), at least 0, up to a factor (`usual_squares`)."""
        return cls(_bounded(squares, HUGE).float())

    def errors(self, target: Tensor, output: Tensor) -> Tensor:
        """Mean distance over tokens and channels of each sequence, in which huge tokens count for less.

        Takes (sequences, tokens, hidden), gives float32 (sequences,). A token whose target is larger than `HUGE_TOKEN`
        times the square of its sequence's median token counts as if it were that large.
        """
        of_tokens = self.differences(target, output).by_token
        return (of_tokens * self._token_weights(target)).sum(1) / target[0].numel()

    def differences(self, target: Tensor, output: Tensor) -> "Squares":
        """Weighted squares of output − target, (sequences, tokens, hidden), by token and by channel."""
        return self._squares(target.float() - output.float())

    def _token_weights(self, target: Tensor) -> Tensor:
        """Weight of each token, float32, (sequences, tokens); 1 where a token is not huge."""
        of_tokens = self._squares(target.float()).by_token
        return torch.stack([_bounded(squares, HUGE_TOKEN) for squares in of_tokens])

    def _squares(self, values: Tensor) -> "Squares":
        values = values * self.weights.sqrt()
        # A norm needs no array of squares.
        by_token, by_channel = (torch.linalg.vector_norm(values, dim=axis).square_() for axis in (2, 1))
        return Squares(by_token, by_channel)

    def gradient(self, target: Tensor, output: Tensor) -> Tensor:
        """By the output, of half the sum: float32, (sequences, tokens, hidden)."""
        return (output.float() - target.float()) * self.weights


@dataclass(frozen=True)
class Squares:
    """Sums of weighted squares: `by_token`, (sequences, tokens), and `by_channel`, (sequences, hidden), float32."""

    by_token: Tensor
    by_channel: Tensor


def _bounded(squares: Tensor, huge: float) -> Tensor:
    """Factor that takes each square down to `huge` times the median, (n,); 1 for smaller ones."""
    bound = torch.maximum(huge * squares.median(), LEAST * squares.max())
    if bound == 0:  # all are zero
        return torch.ones_like(squares)
    return bound / squares.clamp_min(bound)


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
