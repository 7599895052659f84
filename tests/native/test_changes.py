"""Changed values, and gradients by changes, that C computes have the bits of PyTorch's operations."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from llm_barber.method.changes import Changes
from llm_barber.native.changes import ChangedByC
from tests.conftest import bits

pytestmark = pytest.mark.skipif(
    not ChangedByC.can_change(torch.zeros(1)), reason="the C extension was not built, or cannot be used here"
)
ROWS, COLUMNS = 37, 333  # not of whole vectors


def make(values: torch.Tensor, with_c: bool) -> Changes:
    torch.manual_seed(1)
    with patch.object(ChangedByC, "can_change", staticmethod(lambda *_: with_c)):
        changes = Changes(values, torch.rand(1, ROWS, 1), torch.rand(1, COLUMNS) * 10)
    with torch.no_grad():
        changes.parameter.normal_()
        changes.parameter[:, ::7] = 0
    return changes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, compute: torch.dtype, threads: int
) -> None:
    monkeypatch.setattr("llm_barber.native.threads.VALUES_A_THREAD", 1)
    torch.manual_seed(0)
    values = torch.randn(ROWS, COLUMNS).to(stored)
    values[0, :4] = torch.tensor([-0.0, 1e-39, 3e38, -3e38])
    keep, gradient = torch.rand(ROWS, COLUMNS) < 0.5, torch.randn(ROWS, COLUMNS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results: list[list[torch.Tensor]] = []
        for with_c in (True, False):
            changes = make(values, with_c)
            changes.set_gradient(gradient, keep)
            assert changes.parameter.grad is not None
            product = changes.multiply(gradient.clone(), values)
            written = [changes.values(values, compute, keep), changes.values(values, stored)]
            results.append([*written, changes.parameter.grad, product])
    finally:
        torch.set_num_threads(before)
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(bits(found), bits(expected))


def test_values_are_rounded_to_even_and_no_number_stays_one() -> None:
    """A NaN stays a NaN, and is not rounded to infinity."""
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor([1.00390625, 1.01171875, torch.inf, -torch.inf, 3.4e38]), nan]).view(1, -1)
    changed = ChangedByC(torch.zeros(1, 6), torch.ones(1, 1), torch.ones(1, 6))
    found = changed.values(values, torch.bfloat16, torch.ones(1, 6, dtype=torch.bool))
    assert torch.equal(found[:, :5], values[:, :5].bfloat16())
    assert found[0, 5].isnan()


def test_strides_of_masks_do_not_matter() -> None:
    values, keep = torch.randn(ROWS, COLUMNS), (torch.rand(COLUMNS, ROWS) < 0.5).t()
    changed = ChangedByC(torch.zeros(ROWS, COLUMNS), torch.ones(ROWS, 1), torch.ones(1, COLUMNS))
    assert torch.equal(changed.values(values, torch.float32, keep), values * keep)
    assert torch.equal(changed.gradient(values, keep), values * keep)


def test_transposed_linears_are_left_to_pytorch() -> None:
    assert not ChangedByC.can_change(torch.zeros(3, 2).t())
    assert not ChangedByC.can_change(torch.zeros(3, 2, dtype=torch.float16))
    assert not ChangedByC.can_change(torch.zeros(3, 2, device="meta"))


@pytest.mark.parametrize(
    "call",
    [
        lambda changed: changed.values(torch.zeros(2, 4), torch.float32, torch.ones(2, 3, dtype=torch.bool)),
        lambda changed: changed.values(torch.zeros(2, 3), torch.float16, torch.ones(2, 3, dtype=torch.bool)),
        lambda changed: changed.values(torch.zeros(2, 3), torch.float32, torch.ones(2, 3)),
        lambda changed: changed.values(torch.zeros(3, 2).t(), torch.float32, torch.ones(2, 3, dtype=torch.bool)),
        lambda changed: changed.gradient(torch.zeros(2, 3).double(), torch.ones(2, 3, dtype=torch.bool)),
        lambda changed: changed.gradient(torch.zeros(1, 3), torch.ones(2, 3, dtype=torch.bool)),
        lambda changed: changed.multiply(torch.zeros(2, 3), torch.zeros(2, 2)),
        lambda changed: changed.multiply(torch.zeros(3, 2).t(), torch.zeros(2, 3)),
        lambda _: ChangedByC(torch.zeros(2, 3), torch.ones(2), torch.ones(1, 3)),
        lambda _: ChangedByC(torch.zeros(2, 3), torch.ones(2, 1), torch.ones(1, 3).double()),
    ],
)
def test_what_c_could_not_read_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"do not fit|C needs|C changes"):
        call(ChangedByC(torch.zeros(2, 3), torch.ones(2, 1), torch.ones(1, 3)))
