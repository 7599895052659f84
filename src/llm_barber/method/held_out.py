"""Distances on the held-out windows, which take no part in tuning and choose the pass that is kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.method.distance import Distance
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, TARGET, ActivationStreams

# Raise it whenever held-out windows may decide otherwise: a run that was tuned before is then not resumed.
JUDGE_REVISION = 2


@dataclass(frozen=True)
class Judgement:
    """Distance of a layer's output from its target on the held-out windows.

    Attributes:
        error: mean distance over windows, tokens and channels; huge tokens and channels count for less (`Distance`).
        token_share: share of the windows' largest tokens in the squares of the tuned loss; 0 to 1. In these squares
            huge channels count for less, but huge tokens count in full.
        channel_share: share of the largest channel in the same squares; 0 to 1.
    """

    error: float
    token_share: float
    channel_share: float


def judge(
    layer: DecoderLayer, weights: Mapping[str, Tensor], distance: Distance, streams: ActivationStreams
) -> Judgement:
    """Compare the layer's output with its target on the held-out windows of all processes.

    Args:
        layer: the decoder layer.
        weights: (out, in), by linear, of any dtype.
        distance: weights of the channels.
        streams: the layer's input, and its target (`TARGET`).
    """
    weights = {name: weight.to(layer.dtype) for name, weight in weights.items()}
    errors: list[Tensor] = []
    by_channel = torch.zeros_like(distance.weights, dtype=torch.float64)
    largest_tokens = squares = by_channel.new_zeros(())
    for batch in streams.split()[1]:
        target, output = streams.read(TARGET, batch), layer.output_with(weights, streams.read(HIDDEN, batch))
        differences = distance.differences(target, output)
        errors.append(distance.errors(target, differences))
        largest_tokens = largest_tokens + differences.by_token.max(1).values.sum()
        squares = squares + differences.by_token.sum()
        by_channel += differences.by_channel.sum(0)
    streams.ranks.add_tensor(by_channel)
    error = math.fsum(torch.cat(errors).tolist()) if errors else 0.0  # this process may have no held-out window
    error, largest_token, all_squares = streams.ranks.total(error, largest_tokens.item(), squares.item())
    largest_channel = by_channel.max().item()
    return Judgement(error / streams.held_out, _share(largest_token, all_squares), _share(largest_channel, all_squares))


def _share(part: float, whole: float) -> float:
    """Share of a part in a sum of squares, at most 1, as both are rounded; 0 if the sum is 0."""
    return min(part / whole, 1.0) if whole else 0.0
