"""Squared distance of a layer's output from its target; huge channels and huge tokens count for less.

Huge channels: in some models a few channels are hundreds of times as large as the other channels, for every token
(Gemma 3: one or two of 640 hold 90 % of the squares). They dominate the plain squared distance, and steps that lower it
can ruin all other channels. The norm in front of the next linears scales huge channels down.

Huge tokens: in many models one token of a window, mostly the first, has states that are a hundred times as large as
those of the other tokens (an attention sink). Its error arises in the layer that writes the sink, and later layers hand
it on. The sink hides whether the other tokens come nearer, so held-out windows count it for less. The loss that is
tuned counts it in full, since tuned weights ruin a sink that counts for less. Instead, huge terms of the gradients are
scaled down in each linear (`clipped_gradients.py`; measurements: `docs/notebook/refining.md`).
"""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

# A channel whose square exceeds `HUGE_CHANNEL` times the median channel's counts as that large.
HUGE_CHANNEL = 30.0
# A token whose square exceeds `HUGE_TOKEN` times the median token's counts as that large, on held-out windows only.
HUGE_TOKEN = 10.0

LEAST = 1e-6  # least weight of a channel or token; the median is (nearly) zero where most of them are


@dataclass(frozen=True)
class Distance:
    """Σ over tokens and channels of weight · (y − target)².

    `weights`: of the channels, float32, (hidden,); 1 where a channel is not huge.
    """

    weights: Tensor

    @classmethod
    def of(cls, squares: Tensor) -> "Distance":
        """Weigh channels by their usual squares (`usual_squares`), (hidden,), at least 0, in any unit."""
        return cls(_bounded(squares, HUGE_CHANNEL).float())

    def errors(self, target: Tensor, differences: "Squares") -> Tensor:
        """Mean distance over tokens and channels of each sequence, in which huge tokens count for less.

        A token whose target's square exceeds `HUGE_TOKEN` times that of its sequence's median token counts as if it
        were that large.

        Args:
            target: (sequences, tokens, hidden).
            differences: squares by which an output differs from the target (the method `differences`).

        Returns:
            float32, (sequences,).
        """
        return (differences.by_token * self._token_weights(target)).sum(1) / target[0].numel()

    def differences(self, target: Tensor, output: Tensor) -> "Squares":
        """Weighted squares of output − target, (sequences, tokens, hidden), by token and by channel."""
        return self._squares(target.float() - output.float())

    def _token_weights(self, target: Tensor) -> Tensor:
        """Weight of each token, float32, (sequences, tokens); 1 where a token is not huge."""
        by_token = self._squares(target.float()).by_token
        return torch.stack([_bounded(squares, HUGE_TOKEN) for squares in by_token])

    def _squares(self, values: Tensor) -> "Squares":
        """Sum weighted squares of values, (sequences, tokens, hidden), by token and by channel."""
        values = values * self.weights.sqrt()
        # Norms, squared afterwards: they need no array of all squares.
        by_token, by_channel = (torch.linalg.vector_norm(values, dim=axis).square_() for axis in (2, 1))
        return Squares(by_token, by_channel)

    def gradient(self, target: Tensor, output: Tensor) -> Tensor:
        """Gradient of half the summed distance by the output: float32, (sequences, tokens, hidden)."""
        return (output.float() - target.float()) * self.weights


@dataclass(frozen=True)
class Squares:
    """Sums of weighted squares, float32: by token (sequences, tokens), by channel (sequences, hidden)."""

    by_token: Tensor
    by_channel: Tensor


def _bounded(squares: Tensor, huge: float) -> Tensor:
    """Factor of each square, (n,), that lowers it to `huge` times the median; 1 for smaller squares."""
    bound = torch.maximum(huge * squares.median(), LEAST * squares.max())
    # All squares may be zero. A GPU is not waited for to know it.
    return torch.where(bound == 0, 1.0, bound / squares.clamp_min(bound))


def usual_squares(targets: Tensor) -> Tensor:
    """Square of each channel's median size in a sequence, summed over sequences.

    A mean would not do: single tokens, above all the first of a text, are huge in channels that are small otherwise.

    Args:
        targets: (sequences, tokens, hidden).

    Returns:
        float64, (hidden,): sums over batches and processes, rounded to float32, are the same in any order.
    """
    return _medians(targets.abs()).double().square().sum(0)


def _medians(sizes: Tensor) -> Tensor:
    """Lower median over tokens: (sequences, tokens, hidden), at least 0 → (sequences, hidden).

    On CPUs numpy partitions the numbers' bits as integers: for numbers of at least 0 they have the same order. With
    16 bits that is nearly ten times as fast as `torch.median`.
    """
    if sizes.device.type != "cpu":
        return sizes.transpose(1, 2).contiguous().median(-1).values  # a GPU reads rows faster than columns
    bits = sizes.view({2: torch.int16, 4: torch.int32}[sizes.element_size()])
    middle = (sizes.shape[1] - 1) // 2
    # Sequences are transposed separately, which is faster than together.
    medians = [numpy.partition(sequence.t().contiguous().numpy(), middle)[:, middle].copy() for sequence in bits]
    return torch.stack([torch.from_numpy(median) for median in medians]).view(sizes.dtype)
