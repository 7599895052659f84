import pytest
import torch

from llm_barber.method.distance import HUGE_CHANNEL, HUGE_TOKEN, Distance, usual_squares
from llm_barber.record.layers import kept_pass


def test_channels_count_as_if_none_were_huge() -> None:
    squares = torch.tensor(
        [0.0, 1.0, 2.0, 2.0, 2.0, 2 * HUGE_CHANNEL, 4 * HUGE_CHANNEL, 200 * HUGE_CHANNEL, 0.5], dtype=torch.float64
    )
    assert Distance.of(squares).weights.tolist() == pytest.approx([1, 1, 1, 1, 1, 1, 0.5, 0.01, 1])
    assert Distance.of(torch.tensor([0.0, 0.0, 7.0])).weights.tolist() == pytest.approx([1, 1, 1e-6])
    assert Distance.of(torch.zeros(3)).weights.tolist() == [1, 1, 1]  # nothing to compare with


def test_a_huge_token_makes_no_channel_huge() -> None:
    targets = torch.rand(3, 9, 5, generator=torch.Generator().manual_seed(0)) + 1
    targets[:, 0] = 1e4
    targets[..., 2] *= 1e3
    squares = usual_squares(targets)
    expected = [sum(sorted(targets[n, :, c].tolist())[4] ** 2 for n in range(3)) for c in range(5)]
    assert squares.tolist() == pytest.approx(expected, rel=1e-6)
    weights = Distance.of(squares).weights
    assert weights[[0, 1, 3, 4]].tolist() == [1, 1, 1, 1]
    assert weights[2].item() == pytest.approx(HUGE_CHANNEL * sorted(expected)[2] / expected[2], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 8, 513])
def test_usual_squares_are_of_the_lower_median(dtype: torch.dtype, tokens: int) -> None:
    targets = (torch.randn(3, tokens, 5, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    targets[:, ::2, 4] = 0
    by_hand = targets.double().abs().sort(1).values[:, (tokens - 1) // 2].square().sum(0)
    assert torch.equal(usual_squares(targets), by_hand)


def test_errors_and_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, output = (torch.randn(3, 9, 5, generator=generator) for _ in range(2))
    distance = Distance(torch.tensor([1.0, 1.0, 0.25, 1.0, 0.01]))
    output.requires_grad_()
    errors = ((output - targets) ** 2 * distance.weights).mean((1, 2))
    assert distance.errors(targets, distance.differences(targets, output.detach())).tolist() == pytest.approx(
        errors.tolist(), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(errors.sum() * targets[0].numel() / 2, output)
    torch.testing.assert_close(distance.gradient(targets, output.detach()), gradient)


def test_held_out_errors_count_a_huge_token_as_ten_median_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, output = (torch.randn(3, 9, 5, generator=generator) for _ in range(2))
    targets[1, 4] *= 100
    targets[2] = 0  # nothing to compare with
    distance = Distance(torch.tensor([1.0, 1.0, 0.25, 1.0, 0.01]))
    sizes = (targets.double() ** 2 * distance.weights).sum(2)
    by_hand = []
    for size, squares in zip(sizes, ((output - targets) ** 2 * distance.weights).sum(2), strict=True):
        most = HUGE_TOKEN * sorted(size.tolist())[4]
        counts = [most / token_size if token_size > most else 1.0 for token_size in size.tolist()]
        by_hand.append(sum(count * square for count, square in zip(counts, squares.tolist(), strict=True)) / 45)
    assert min(HUGE_TOKEN * sorted(sizes[1].tolist())[4] / token_size for token_size in sizes[1].tolist()) < 0.01
    assert distance.errors(targets, distance.differences(targets, output)).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_loss_counts_a_huge_token_in_full() -> None:
    targets, output = torch.ones(1, 4, 2), torch.zeros(1, 4, 2)
    targets[0, 0] = 1000
    distance = Distance(torch.ones(2))
    assert distance.gradient(targets, output)[0, :, 0].tolist() == [-1000, -1, -1, -1]
    squares = distance.differences(targets, output)
    assert squares.by_token[0].tolist() == pytest.approx([2e6, 2, 2, 2])
    assert squares.by_channel[0].tolist() == pytest.approx([1e6 + 3, 1e6 + 3])


@pytest.mark.parametrize(
    ("held_out", "kept"),
    [
        ((), None),
        ((1.0,), 0),
        ((0.5, 0.4, 0.6, 0.45, 0.7), 3),
        ((0.5, 0.5, 0.6), 0),
        ((0.5, float("nan"), 0.4), 2),
        ((0.5, 0.4, float("nan")), 1),
    ],
)
def test_the_last_pass_that_beats_the_untuned_layer_is_kept(held_out: tuple[float, ...], kept: int | None) -> None:
    assert kept_pass(held_out) == kept
