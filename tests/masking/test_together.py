"""Statistics of many linears at once equal those of one linear after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_barber.masking import together
from llm_barber.masking.gradient_squares import FisherSums, GradientSquares
from llm_barber.masking.gram import GramMatrix, TargetMoments, mirror
from llm_barber.masking.statistics import InputMoments, InputSquares, RunningSums
from llm_barber.masking.together import _add_squares, _square_and_add, update_together
from tests.helpers.experts import Operations

LINEARS, SEQUENCES, TOKENS, IN, OUT = 5, 3, 11, 70, 4
CPU = torch.device("cpu")
OF_INPUTS: dict[str, Callable[[], Any]] = {
    "squares": lambda: InputSquares(IN, CPU),
    "moments": lambda: InputMoments(IN, CPU),
    "gram": lambda: GramMatrix(IN, CPU),
}
OF_GRADIENTS: dict[str, Callable[[], Any]] = {
    "gradients": lambda: GradientSquares((OUT, IN), CPU),
    "fisher": lambda: FisherSums((OUT, IN), CPU),
}


def batch(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and gradients of linears, with padding, and scales; the last linear has no token."""
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(LINEARS, SEQUENCES, TOKENS, IN, generator=made)
    gradients = torch.randn(LINEARS, SEQUENCES, TOKENS, OUT, generator=made)
    for linear in range(LINEARS):
        for sequence in range(SEQUENCES):
            count = (3 * linear + 5 * sequence) % TOKENS if linear < LINEARS - 1 else 0
            inputs[linear, sequence, count:] = gradients[linear, sequence, count:] = 0
    return inputs.to(dtype), gradients.to(dtype), torch.tensor([1.0, 2.0**-70, 8.0])


def sums(statistic: RunningSums) -> list[torch.Tensor]:
    """All sums of a statistic; Gram matrices are complete."""
    return [
        mirror(part.clone()) if part.dim() == 2 and part.shape[0] == part.shape[1] else part
        for part in statistic.parts()
    ]


@pytest.mark.parametrize("elements", [1, 2 * OUT * IN, 2**24])  # one matrix at a time, a few, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*OF_INPUTS, *OF_GRADIENTS])
def test_together_equals_one_after_the_other(
    kind: str, dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "MATRIX_ELEMENTS", elements)
    make = (OF_INPUTS | OF_GRADIENTS)[kind]
    grouped, again, expected = ([make() for _ in range(LINEARS)] for _ in range(3))
    for seed in range(2):
        inputs, gradients, scale = batch(dtype, seed)
        further = () if kind in OF_INPUTS else (gradients, scale)
        update_together(grouped, inputs, *further)
        update_together(again, inputs, *further)
        for index, statistic in enumerate(expected):
            statistic.update(inputs[index], *(() if kind in OF_INPUTS else (gradients[index], scale)))
    # A product of half-precision gradients is rounded to 2^-9 by both, and squared.
    rtol = 2e-2 if kind == "gradients" and dtype == torch.bfloat16 else 1e-5
    for result, same, of in zip(grouped, again, expected, strict=True):
        for total, repeated, wanted in zip(sums(result), sums(same), sums(of), strict=True):
            assert torch.equal(total, repeated)
            torch.testing.assert_close(total, wanted, rtol=rtol, atol=rtol)
    assert all(not part.any() for part in sums(grouped[-1]) if part.numel() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_are_added_as_a_gpu_adds_them(dtype: torch.dtype) -> None:
    inputs, gradients, _ = batch(dtype, 0)
    totals = [[torch.ones(OUT, IN) for _ in range(LINEARS)] for _ in range(2)]
    for add, total in zip((_add_squares, _square_and_add), totals, strict=True):
        add(total, inputs[:, 1], gradients[:, 1], torch.tensor(0.25), 0.3)
    for at_once, squared in zip(*totals, strict=True):
        torch.testing.assert_close(at_once, squared, rtol=1e-6, atol=0)
    expected = 1 + (0.25 * 0.3 * gradients[1, 1].double().t() @ inputs[1, 1].double()) ** 2
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(totals[0][1].double(), expected, rtol=rtol, atol=rtol)
    assert (totals[0][1] > 1.01).any()


def test_a_statistic_without_a_grouped_sum_is_updated_linear_by_linear() -> None:
    class Own(GradientSquares):
        """A statistic of a caller."""

        def update(
            self, inputs: torch.Tensor, output_gradient: torch.Tensor, scale: torch.Tensor, factor: float = 1.0
        ) -> None:
            self.total += scale.sum() + inputs.sum() + output_gradient.sum() + factor

    inputs, gradients, scale = batch(torch.float32, 0)
    statistics = [Own((OUT, IN), CPU) for _ in range(LINEARS)]
    update_together(statistics, inputs, gradients, scale, 0.5)
    for index, statistic in enumerate(statistics):
        expected = scale.sum() + inputs[index].sum() + gradients[index].sum() + 0.5
        torch.testing.assert_close(statistic.total, expected.expand(OUT, IN))


@pytest.mark.parametrize("elements", [1, 2 * IN * IN, 2**24])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_moments_together_equal_one_after_the_other(
    dtype: torch.dtype, crossed: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "MATRIX_ELEMENTS", elements)
    joined, single = ([TargetMoments(IN, CPU, crossed) for _ in range(LINEARS)] for _ in range(2))
    for seed in range(2):
        inputs, dense_inputs = batch(dtype, seed)[0], batch(dtype, seed + 2)[0] if crossed else None
        update_together(joined, inputs, dense_inputs)
        for index, moments in enumerate(single):
            moments.update(inputs[index], None if dense_inputs is None else dense_inputs[index])
    for moments, expected in zip(joined, single, strict=True):
        torch.testing.assert_close(moments.gram, expected.gram, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.difference, expected.difference, rtol=1e-5, atol=1e-6)
        assert moments.tokens == expected.tokens == 2 * SEQUENCES * TOKENS


def test_a_single_linear_keeps_its_bits() -> None:
    inputs, gradients, scale = batch(torch.bfloat16, 0)
    for kind, make in (OF_INPUTS | OF_GRADIENTS).items():
        single, expected = make(), make()
        further = () if kind in OF_INPUTS else (gradients[:1], scale)
        update_together([single], inputs[:1], *further)
        expected.update(inputs[0], *(() if kind in OF_INPUTS else (gradients[0], scale)))
        assert all(map(torch.equal, single.parts(), expected.parts()))


@pytest.mark.parametrize(
    ("kind", "counters"), {"squares": 1, "moments": 2, "gram": 1, "gradients": 1, "fisher": 0}.items()
)
def test_operations_do_not_grow_with_the_number_of_linears(kind: str, counters: int) -> None:
    """But for the counters of sequences and tokens, which are on the host."""
    counts = []
    for repeated in (1, 6):
        inputs, gradients, scale = batch(torch.float32, 0)
        statistics = [(OF_INPUTS | OF_GRADIENTS)[kind]() for _ in range(repeated * LINEARS)]
        further = () if kind in OF_INPUTS else (torch.cat([gradients] * repeated), scale)
        joined = torch.cat([inputs] * repeated)
        with Operations() as counted:
            update_together(statistics, joined, *further)
        counts.append(counted.count - counters * len(statistics))
    assert counts[0] == counts[1]
