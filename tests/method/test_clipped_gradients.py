"""Gradients by weights in which no token counts for much more than the others."""

import math

import pytest
import torch
from torch import Tensor

from llm_barber.method.clipped_gradients import HUGE_TERM, clipped_gradients_by_weights
from llm_barber.model.gradients import LinearGradients

TOKENS, WIDTH, ROWS = 9, 6, 4


def part_of(linears: int, sequences: int, dtype: torch.dtype = torch.float32) -> LinearGradients:
    """Random inputs and gradients; token 2 of the first sequence is huge."""
    generator = torch.Generator().manual_seed(linears)
    inputs = torch.randn(linears, sequences, TOKENS, WIDTH, generator=generator)
    gradients = torch.randn(linears, sequences, TOKENS, ROWS, generator=generator)
    inputs[:, 0, 2] *= 30
    gradients[:, 0, 2] *= 40
    names = tuple(f"experts.{number}.up_proj" for number in range(linears))
    return LinearGradients(names, inputs.to(dtype), gradients.to(dtype))


def by_token(part: LinearGradients, most: float) -> dict[str, Tensor]:
    """The same token by token, in float64."""
    results = {}
    for name, inputs, gradients in zip(part.names, part.inputs.double(), part.gradients.double(), strict=True):
        total = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
        for sequence, of_sequence in zip(inputs, gradients, strict=True):
            terms = [torch.outer(g, x) for g, x in zip(of_sequence, sequence, strict=True)]
            norms = sorted(float(term.norm()) for term in terms if term.any())
            for term in terms:
                bound = most * norms[(len(norms) - 1) // 2] if norms else 0
                huge = float(term.norm()) > bound
                total += term * (bound / float(term.norm())) if huge else term
        results[name] = total
    return results


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize(("linears", "sequences"), [(1, 1), (1, 3), (5, 2)])
def test_gradients_are_sums_over_tokens(linears: int, sequences: int, dtype: torch.dtype, tolerance: float) -> None:
    part = part_of(linears, sequences, dtype)
    expected, in_full = by_token(part, HUGE_TERM), by_token(part, math.inf)
    results = clipped_gradients_by_weights([part])
    assert list(results) == list(part.names)
    for name, gradient in results.items():
        assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert (gradient.double() - expected[name]).norm() < tolerance * expected[name].norm()
        assert (in_full[name] - expected[name]).norm() > 2 * expected[name].norm()


def test_a_tiny_gradient_of_a_huge_input_does_not_underflow() -> None:
    """The factor of the token is 10 / 10⁵; scaled by it, the gradient would be below the least float16."""
    part = part_of(1, 1)
    inputs, gradients = torch.full_like(part.inputs, 0.25), torch.full_like(part.gradients, 1e-3)
    inputs[0, 0, 2] *= 1e5
    half = LinearGradients(part.names, inputs.half(), gradients.half())
    expected = by_token(half, HUGE_TERM)[half.names[0]]
    assert (clipped_gradients_by_weights([half])[half.names[0]].double() - expected).norm() < 0.005 * expected.norm()


def test_a_sum_over_tokens_may_exceed_the_largest_float16() -> None:
    ones = torch.ones(1, 1, 2048, 2, dtype=torch.float16)
    (gradient,) = clipped_gradients_by_weights([LinearGradients(("up_proj",), 40 * ones, ones)]).values()
    assert gradient.tolist() == [[81920, 81920], [81920, 81920]]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_broken_gradient_stays_broken(value: float) -> None:
    """So that the run ends with an error."""
    part = part_of(1, 1)
    part.gradients[0, 0, 2, 1] = value
    assert not clipped_gradients_by_weights([part])[part.names[0]].isfinite().all()


def test_of_two_tokens_the_smaller_is_the_median() -> None:
    part = part_of(1, 1)
    two = LinearGradients(part.names, part.inputs[:, :, 2:4], part.gradients[:, :, 2:4])
    one = LinearGradients(part.names, part.inputs[:, :, 2:3], part.gradients[:, :, 2:3])
    for few in (two, one):
        gradient = clipped_gradients_by_weights([few])[few.names[0]].double()
        torch.testing.assert_close(gradient, by_token(few, HUGE_TERM)[few.names[0]], rtol=1e-5, atol=1e-5)


def test_padding_and_tokens_without_a_gradient_do_not_count() -> None:
    """Zeros pad the inputs of experts; with them in the median, every token would be huge."""
    part = part_of(2, 1)
    padded = LinearGradients(
        part.names, *(torch.nn.functional.pad(values, (0, 0, 0, 50)) for values in (part.inputs, part.gradients))
    )
    expected = clipped_gradients_by_weights([part])
    for name, gradient in clipped_gradients_by_weights([padded]).items():
        torch.testing.assert_close(gradient, expected[name])


def test_parts_are_clipped_each_by_itself() -> None:
    """Also those that are computed together, as they have the same number of tokens."""
    parts = [part_of(linears, sequences) for linears, sequences in ((1, 1), (2, 1), (1, 3))]
    parts[1] = LinearGradients(("gate", "down"), parts[1].inputs, 100 * parts[1].gradients)
    parts[2] = LinearGradients(("query",), parts[2].inputs, parts[2].gradients)
    together = clipped_gradients_by_weights(parts)
    assert len(together) == 4
    for part in parts:
        for name, gradient in clipped_gradients_by_weights([part]).items():
            assert torch.equal(together[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_without_any_gradient_has_zeros(dtype: torch.dtype) -> None:
    part = part_of(2, 1, dtype)
    results = clipped_gradients_by_weights([LinearGradients(part.names, part.inputs, torch.zeros_like(part.gradients))])
    for gradient in results.values():
        assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert not gradient.any()
