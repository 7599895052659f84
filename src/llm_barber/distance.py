"""How far a layer's output is from what it should be: squares, in which channels that are always huge count for less.

Some models keep a few channels that are hundreds of times as large as the others, for every token (Gemma 3: 0.1 % of
the channels have 90 % of the squares). The plain squared distance is that of these channels, and what lowers it can
ruin all the others; what reads the states normalises them, and scales such channels down.
"""

import torch
from torch import Tensor

from llm_barber.model.gradients import mean_squares
from llm_barber.model.streams import ActivationStreams

HUGE = 100.0  # times the median channel's square: channels count as if they were no larger


class Distance:
    """From the targets in a stream: Σ over tokens and channels of weight · (y − target)².

    Attributes:
        weights: of the channels, float32, (hidden,); 1 where a channel is not huge.
    """

    def __init__(self, streams: ActivationStreams, targets: str) -> None:
        """Look at how large each channel is for most tokens.

        Args:
            streams: with the targets, (sequences, tokens, hidden), of this process's windows.
            targets: the name of their stream.
        """
        squares = torch.stack([_usual_squares(streams.read(targets, batch)) for batch in streams.batches()]).sum(0)
        streams.ranks.add_tensor(squares)
        self.weights = channel_weights(squares)

    def errors(self, target: Tensor, output: Tensor) -> Tensor:
        """The mean over tokens and channels, float32 (sequences,)."""
        return mean_squares((target.float() - output.float()) * self.weights.sqrt())

    def gradient(self, target: Tensor, output: Tensor) -> Tensor:
        """By the output, of half the sum: float32, (sequences, tokens, hidden)."""
        return (output.float() - target.float()) * self.weights


def channel_weights(squares: Tensor) -> Tensor:
    """What a channel's squared error counts for: 1, or less, if it is huge.

    Args:
        squares: the channels' usual squares, (hidden,), at least 0, up to a factor.

    Returns:
        float32, (hidden,).
    """
    bound = HUGE * squares.median()
    return (bound / squares.clamp_min(bound)).float() if bound > 0 else torch.ones_like(squares, dtype=torch.float32)


def _usual_squares(states: Tensor) -> Tensor:
    """The square of each channel's median size over the tokens of a sequence, summed: float64, (hidden,).

    The median, since single tokens, the first of a text above all, are huge in channels that are small otherwise.
    """
    return states.abs().median(1).values.double().square().sum(0)
