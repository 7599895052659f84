"""Sums of gradients: the same bytes however many sequences are added together."""

import pytest
import torch
from torch import Tensor

from llm_barber.gpu.kernels import DTYPES
from llm_barber.method import gradient_sums
from llm_barber.method.gradient_sums import GATHERED, GradientSums, gradients_gathered

WEIGHTS = {"a": torch.empty(3, 5), "b": torch.empty(2, 4), "idle": torch.empty(1, 2)}


def gradients(dtype: torch.dtype) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Gradients of five sequences, and their scales; the first has none by `b`."""
    made = torch.Generator().manual_seed(0)
    by_sequence = [
        {name: torch.randn(WEIGHTS[name].shape, generator=made).to(dtype) for name in ("a", "b")} for _ in range(5)
    ]
    del by_sequence[0]["b"]
    largest = 40 if dtype == torch.float32 else 24  # so large that sums round
    return [
        (values, torch.tensor([2.0**exponent]))
        for values, exponent in zip(by_sequence, (5, largest, 4, 6, 5), strict=True)
    ]


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_one_sequence_after_the_other(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, together: int
) -> None:
    monkeypatch.setattr(gradient_sums, "has_kernels", lambda *_: True)
    monkeypatch.setattr(gradient_sums, "gradients_gathered", lambda *_: together)
    sums = GradientSums(WEIGHTS, dtype)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    for step in (gradients(dtype), gradients(dtype)[1:4]):  # the second begins anew
        expected = {name: torch.zeros(weight.shape, dtype=wider) for name, weight in WEIGHTS.items()}
        sums.begin()
        for values, scale in step:
            sums.add(values, scale)
            for name, value in values.items():
                expected[name] += value.to(wider) * scale
        found = sums.finish()
        backwards = sum(values["a"].to(wider) * scale for values, scale in reversed(step))
        assert not torch.equal(found["a"], backwards)  # the order shows
        assert all(found[name].dtype == wider and torch.equal(found[name], each) for name, each in expected.items())


def test_a_gpu_gathers_the_gradients_of_a_step_if_they_are_small_and_in_half_precision() -> None:
    assert [gradients_gathered(GATHERED // 2 // share, 2) for share in (1, 2, 3, 4, 10)] == [1, 2, 3, 4, 4]
    assert gradients_gathered(GATHERED, 2) == 1
    assert gradients_gathered(0, 2) == 4
    assert gradients_gathered(10**6, 4) == 1


@pytest.mark.parametrize(("having", "held"), [(set(), 0), ({torch.float32}, 0), ({torch.bfloat16}, 1)])
def test_a_device_without_the_kernels_holds_no_gradients(
    monkeypatch: pytest.MonkeyPatch, having: set[torch.dtype], held: int
) -> None:
    monkeypatch.setattr(gradient_sums, "has_kernels", lambda _, dtype: dtype in having)
    sums = GradientSums(WEIGHTS, torch.bfloat16)
    sums.add(*gradients(torch.bfloat16)[1])
    assert len(sums._gathered) == held
