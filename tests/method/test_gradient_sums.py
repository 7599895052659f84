"""Sums of gradients are their definition, sequence after sequence."""

import pytest
import torch
from torch import Tensor

from llm_barber.method.gradient_sums import GradientSums

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_those_of_one_sequence_after_the_other(dtype: torch.dtype) -> None:
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
