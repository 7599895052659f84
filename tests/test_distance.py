import pytest
import torch

from llm_barber.distance import HUGE, Distance, channel_weights
from llm_barber.model.streams import ActivationStreams


def test_channels_count_as_if_none_were_huge() -> None:
    squares = torch.tensor([0.0, 1.0, 2.0, 2.0, 2.0, 59.0, 120.0, 6000.0, 0.5], dtype=torch.float64)
    expected = [1, 1, 1, 1, 1, 1, 0.5, 0.01, 1]
    assert channel_weights(torch.where(squares > 50, squares * HUGE / 30, squares)).tolist() == pytest.approx(expected)
    assert channel_weights(torch.tensor([0.0, 0.0, 7.0])).tolist() == [1, 1, 1]  # nothing to compare with


def test_a_huge_token_makes_no_channel_huge() -> None:
    targets = torch.rand(3, 9, 5, generator=torch.Generator().manual_seed(0)) + 1
    targets[:, 0] = 1e4
    targets[..., 2] *= 1e3
    streams = ActivationStreams(3, 2, torch.device("cpu"))
    streams.write("target", slice(0, 2), targets[:2])
    streams.write("target", slice(2, 3), targets[2:])
    found = Distance(streams, "target")
    assert found.weights[[0, 1, 3, 4]].tolist() == [1, 1, 1, 1]
    squares = targets.abs().median(1).values.square().sum(0)
    assert found.weights[2].item() == pytest.approx((HUGE * squares.median() / squares[2]).item(), rel=1e-5)
    output = targets + torch.randn(targets.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    errors = ((output - targets) ** 2 * found.weights).mean((1, 2))
    assert found.errors(targets, output.detach()).tolist() == pytest.approx(errors.tolist(), rel=1e-5)
    (gradient,) = torch.autograd.grad(errors.sum() * targets[0].numel() / 2, output)
    torch.testing.assert_close(found.gradient(targets, output.detach()), gradient)
