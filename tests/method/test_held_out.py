"""Judgement by held-out windows: distance from the target, and the share of one token or channel."""

import pytest
import torch

from llm_barber.method.distance import Distance
from llm_barber.method.held_out import judge
from llm_barber.model.streams import HIDDEN, TARGET


class FakeLayer:
    """Layer that multiplies its input by one number, its weight."""

    dtype = torch.float32

    def output_with(self, weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        return hidden * weights["scale"]


class FakeRanks:
    """One process."""

    def add_tensor(self, tensor: torch.Tensor) -> None:
        pass

    def total(self, *values: float) -> list[float]:
        return list(values)


class FakeStreams:
    """Arrays by name, in two batches that are held out."""

    ranks = FakeRanks()

    def __init__(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        self.arrays = {HIDDEN: hidden, TARGET: target}
        self.held_out = len(hidden)

    def split(self) -> tuple[list[slice], list[slice]]:
        return [], [slice(0, 2), slice(2, 3)]

    def read(self, name: str, batch: slice) -> torch.Tensor:
        return self.arrays[name][batch]


def test_shares_of_the_largest_token_and_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(3, 8, 4, generator=generator, dtype=torch.float32) for _ in range(2))
    target[:, 0, 2] = 50
    distance = Distance(torch.tensor([1.0, 1.0, 0.5, 1.0]))
    judgement = judge(FakeLayer(), {"scale": torch.tensor(2.0)}, distance, FakeStreams(hidden, target))  # type: ignore[arg-type]
    squares = (2 * hidden - target).double().square() * distance.weights
    by_token, by_channel = squares.sum(2), squares.sum((0, 1))
    assert judgement.token_share == pytest.approx((by_token.max(1).values.sum() / squares.sum()).item(), rel=1e-5)
    assert judgement.channel_share == pytest.approx((by_channel.max() / squares.sum()).item(), rel=1e-5)
    assert judgement.token_share > 0.8
    mean_error = distance.errors(target, distance.differences(target, 2 * hidden)).mean()
    assert judgement.error == pytest.approx(mean_error.item(), rel=1e-6)


def test_no_difference_has_no_shares() -> None:
    hidden = torch.ones(3, 8, 4)
    judgement = judge(FakeLayer(), {"scale": torch.tensor(1.0)}, Distance(torch.ones(4)), FakeStreams(hidden, hidden))  # type: ignore[arg-type]
    assert (judgement.error, judgement.token_share, judgement.channel_share) == (0, 0, 0)
