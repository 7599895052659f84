"""The unpacking kernel against the packed weight: in Triton's interpreter, or on a GPU where there is one."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.checkpoint.rounding import pack_rounded, unpack_rounded
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.runtime import on_gpu
from llm_barber.runtime.kernels import unpack as kernel
from llm_barber.runtime.packed_linear import PackedLinear
from tests.helpers.kernels import launches
from tests.runtime.kernels.packing import DEVICE, DTYPES, bits, packed_linear, pruned


def check(weight: Tensor) -> None:
    """Compare bits: −0.0 and NaN are values as others are, and what is pruned is +0.0."""
    unpacked = packed_linear(weight).to(DEVICE).gpu_weight().unpack().cpu()
    assert unpacked.dtype == weight.dtype
    assert torch.equal(bits(unpacked), bits(weight))


@pytest.mark.parametrize("target", [Unstructured(0.5), Unstructured(0.9), NofM(2, 4), NofM(1, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_weight_bit_for_bit(target: Pattern, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(pruned(24, 320, target, dtype))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (17, 7), (5, 256), (18, 257), (3, 13)])
def test_ragged_shapes(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    check(weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.7, 0))


def test_special_values_and_rows_with_nothing_and_with_everything() -> None:
    weight = torch.zeros(9, 300)
    weight[3] = torch.arange(1.0, 301)
    weight[8, 299] = -5
    weight[4, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-45])
    check(weight)
    check(torch.zeros(4, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(320, 128), (300, 7), (64, 1000)])
def test_int8_values_are_restored_bit_for_bit(dtype: torch.dtype, columns: int, group: int) -> None:
    weight = pruned(9, columns, Unstructured(0.5), dtype)
    weight[0, :4] = torch.finfo(dtype).max * torch.tensor([1, -1, 0.99, 1e-6], dtype=torch.float64).to(dtype)
    rounded = pack_rounded(weight, group)
    assert rounded is not None
    restored = PackedLinear(rounded, None).to(DEVICE).gpu_weight()
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter does not round to bfloat16: it cuts off
        restored = replace(restored, dtype=torch.float32)
    largest = torch.finfo(dtype).max
    unpacked = restored.unpack().cpu().clamp(-largest, largest).to(dtype)
    assert torch.equal(bits(unpacked), bits(unpack_rounded(rounded)))


def test_many_rows_of_inputs_are_multiplied_with_the_unpacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 600).masked_fill(torch.rand(6, 600) < 0.6, 0)
    monkeypatch.setattr(on_gpu, "has_kernels", lambda _: True)
    linear = packed_linear(weight)
    inputs = torch.randn(5, 600)
    torch.testing.assert_close(linear(inputs), inputs @ weight.T)
    events = launches(monkeypatch, kernel, "_unpack")
    assert linear(inputs).shape == (5, 6)
    assert events == [linear.values, "launch", linear.values]
