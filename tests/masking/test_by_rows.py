"""Arithmetic a few rows at a time gives the bytes of whole matrices."""

import pytest
import torch

from llm_barber.masking import by_rows
from llm_barber.masking.by_rows import add_scaled, add_squares, multiply

SCALE = torch.tensor([0.75])


@pytest.mark.parametrize("numbers", [1, 7, 20, 2**17])  # of rows of 6
@pytest.mark.parametrize("of_values", [torch.bfloat16, torch.float32])
def test_sums_are_their_definitions(numbers: int, of_values: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    values, before = torch.randn(9, 6, generator=generator).to(of_values), torch.randn(9, 6, generator=generator)
    exact = values.double()
    for dtype in (torch.float32, torch.float64):
        total = before.to(dtype, copy=True)
        add_scaled(total, values, SCALE, begins=False)
        torch.testing.assert_close(total.double(), before.double() + 0.75 * exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(total, before.to(dtype).addcmul(values, SCALE))  # as a GPU adds
        begun = torch.full_like(before, torch.nan, dtype=dtype)
        add_scaled(begun, values, SCALE, begins=True)
        assert torch.equal(begun, values.to(dtype) * 0.75)
        product = before.to(dtype, copy=True)
        assert multiply(product, values) is product
        assert torch.equal(product, before.to(dtype) * values.to(dtype))
    total = before.clone()
    add_squares(total, values, SCALE[0])
    torch.testing.assert_close(total.double(), before.double() + (0.75 * exact) ** 2, rtol=1e-6, atol=1e-6)
    scaled = values * SCALE
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(total, before.addcmul(scaled, scaled))


def test_rows_at_a_time_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    by_size = []
    for numbers in (2**17, 100):
        monkeypatch.setattr(by_rows, "NUMBERS", numbers)
        totals = [torch.ones(40, 33) for _ in range(4)]
        add_scaled(totals[0], values, SCALE, begins=False)
        add_squares(totals[1], values, SCALE[0])
        multiply(totals[2], values)
        add_scaled(totals[3], values, SCALE, begins=True)
        by_size.append(totals)
    assert all(torch.equal(*pair) for pair in zip(*by_size, strict=True))
