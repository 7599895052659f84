"""Gradients by weights in which no token counts for much more than the others."""

import math

import pytest
import torch
from torch import Tensor

from llm_barber.method.clipped_gradients import HUGE_TERM, clipped_gradients_by_weights
from llm_barber.model.gradients import LinearGradients

TOKENS, WIDTH, ROWS = 9, 6, 4


def part_of(sequences: int, dtype: torch.dtype = torch.float32) -> LinearGradients:
    """Random inputs and gradients; token 2 of the first sequence is huge."""
    generator = torch.Generator().manual_seed(sequences)
    inputs = torch.randn(sequences, TOKENS, WIDTH, generator=generator)
    gradients = torch.randn(sequences, TOKENS, ROWS, generator=generator)
    inputs[0, 2] *= 30
    gradients[0, 2] *= 40
    return LinearGradients("up_proj", inputs.to(dtype), gradients.to(dtype))


def by_token(part: LinearGradients, most: float) -> Tensor:
    """The same token by token, in float64."""
    total = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for sequence, of_sequence in zip(part.inputs.double(), part.gradients.double(), strict=True):
        terms = [torch.outer(g, x) for g, x in zip(of_sequence, sequence, strict=True)]
        norms = sorted(float(term.norm()) for term in terms if term.any())
        for term in terms:
            bound = most * norms[(len(norms) - 1) // 2] if norms else 0
            huge = float(term.norm()) > bound
            total += term * (bound / float(term.norm())) if huge else term
    return total


def clipped(part: LinearGradients) -> Tensor:
    """The gradient by the weight of one linear."""
    (gradient,) = clipped_gradients_by_weights([part]).values()
    return gradient


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("sequences", [1, 3])
def test_gradients_are_sums_over_tokens(sequences: int, dtype: torch.dtype, tolerance: float) -> None:
    part = part_of(sequences, dtype)
    expected, in_full = by_token(part, HUGE_TERM), by_token(part, math.inf)
    gradient = clipped(part)
    assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert (gradient.double() - expected).norm() < tolerance * expected.norm()
    assert (in_full - expected).norm() > 2 * expected.norm()


def test_a_tiny_gradient_of_a_huge_input_does_not_underflow() -> None:
    """The factor of the token is 10 / 10⁵; scaled by it, the gradient would be below the least float16."""
    part = part_of(1)
    inputs, gradients = torch.full_like(part.inputs, 0.25), torch.full_like(part.gradients, 1e-3)
    inputs[0, 2] *= 1e5
    half = LinearGradients(part.name, inputs.half(), gradients.half())
    expected = by_token(half, HUGE_TERM)
    assert (clipped(half).double() - expected).norm() < 0.005 * expected.norm()


def test_a_sum_over_tokens_may_exceed_the_largest_float16() -> None:
    ones = torch.ones(1, 2048, 2, dtype=torch.float16)
    assert clipped(LinearGradients("up_proj", 40 * ones, ones)).tolist() == [[81920, 81920], [81920, 81920]]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_broken_gradient_stays_broken(value: float) -> None:
    """So that the run ends with an error."""
    part = part_of(1)
    part.gradients[0, 2, 1] = value
    assert not clipped(part).isfinite().all()


def test_of_two_tokens_the_smaller_is_the_median() -> None:
    part = part_of(1)
    for few in (slice(2, 4), slice(2, 3)):
        tokens = LinearGradients(part.name, part.inputs[:, few], part.gradients[:, few])
        torch.testing.assert_close(clipped(tokens).double(), by_token(tokens, HUGE_TERM), rtol=1e-5, atol=1e-5)


def test_padding_and_tokens_without_a_gradient_do_not_count() -> None:
    """Zeros pad the inputs of experts; with them in the median, every token would be huge."""
    part = part_of(1)
    padded = (torch.nn.functional.pad(values, (0, 0, 0, 50)) for values in (part.inputs, part.gradients))
    torch.testing.assert_close(clipped(LinearGradients(part.name, *padded)), clipped(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_without_any_gradient_has_zeros(dtype: torch.dtype) -> None:
    part = part_of(1, dtype)
    gradient = clipped(LinearGradients(part.name, part.inputs, torch.zeros_like(part.gradients)))
    assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert not gradient.any()
