"""The decode kernel against the product in float64: in Triton's interpreter, or on a GPU where there is one."""

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.checkpoint.encoding import bitmask, pack
from llm_barber.checkpoint.rounding import pack_rounded, restore_rows
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.runtime.decode_kernel import decode_product
from llm_barber.runtime.on_gpu import GpuWeight, find_places

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/__init__.py chooses the interpreter
HALF = Unstructured(0.5)
# Sums are float32; outputs of bfloat16 and float16 are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def pruned(rows: int, columns: int, target: Pattern, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return apply_mask(weight, initial_mask(weight.float().abs(), target, Granularity.LINEAR))


def on_device(weight: Tensor, group: int = 0) -> GpuWeight:
    packed, scales = pack(weight), None
    if group:
        rounded = pack_rounded(weight, group)
        assert rounded is not None
        packed, scales = rounded.packed, rounded.scales.to(DEVICE)
    assert packed is not None
    places = find_places(torch.from_numpy(bitmask(packed)).to(DEVICE), packed.shape)
    return GpuWeight(places, packed.values.to(DEVICE), scales, group, weight.shape[1], weight.dtype)


def check(weight: Tensor, packed: GpuWeight, inputs: Tensor, bias: Tensor | None = None) -> None:
    """Compare the kernel's product with that of float64."""
    assert packed.can_decode(inputs.to(DEVICE), bias)
    places, on_gpu = packed.places, inputs.to(DEVICE)
    output = decode_product(packed.values, places.words, places.starts, on_gpu, bias, packed.scales, packed.group)
    expected = torch.nn.functional.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert output.shape == expected.shape
    assert output.dtype == inputs.dtype
    torch.testing.assert_close(output.cpu().double(), expected, rtol=TOLERANCE[inputs.dtype], atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        (HALF, torch.bfloat16), (HALF, torch.float16), (HALF, torch.float32), (Unstructured(0.95), torch.bfloat16),
        (NofM(2, 4), torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (5, 1088)])
def test_the_product_is_the_dense_one(target: Pattern, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = pruned(rows, columns, target, dtype)
    check(weight, on_device(weight), torch.randn(2, 1, columns).to(dtype), torch.randn(rows).to(dtype))
    check(weight, on_device(weight), torch.randn(columns, 4).to(dtype).T)  # not contiguous


@pytest.mark.parametrize(("columns", "group"), [(1088, 128), (192, 24), (64, 64)])
def test_int8_values_are_multiplied_by_their_scales(columns: int, group: int) -> None:
    """The values times their scales are not rounded to the weight's dtype first."""
    weight = pruned(6, columns, HALF, torch.bfloat16)
    packed = on_device(weight, group)
    exact = GpuWeight(packed.places, packed.values, packed.scales, group, columns, torch.float32).unpack().cpu()
    check(exact, packed, torch.randn(3, columns).bfloat16())


def test_rows_with_nothing_and_with_everything_and_special_inputs() -> None:
    weight = torch.zeros(9, 320).half()
    weight[3] = torch.arange(1.0, 321)
    weight[8, 319] = 5
    check(weight, on_device(weight), torch.ones(2, 320).half())
    inputs = torch.ones(1, 320).half()
    inputs[0, 5] = torch.inf  # a pruned weight is a zero, and zero times infinity is NaN
    check(weight, on_device(weight), inputs)


@pytest.mark.parametrize("group", [0, 32])
def test_the_unpacked_weight_is_the_packed_one_bit_for_bit(group: int) -> None:
    weight = pruned(6, 128, HALF, torch.bfloat16)
    packed = on_device(weight, group)
    expected = weight
    if group:
        rounded = pack_rounded(weight, group)
        assert rounded is not None
        quotients = torch.zeros(weight.shape, dtype=torch.int8)
        quotients[weight != 0] = rounded.values
        expected = restore_rows(quotients, rounded.scales, group, weight.dtype)
    assert torch.equal(packed.unpack().cpu(), expected)


def test_the_kernel_takes_few_rows_of_fitting_inputs() -> None:
    packed = on_device(pruned(6, 128, HALF, torch.bfloat16))
    assert packed.can_decode(torch.ones(4, 128, device=DEVICE).bfloat16(), None)
    for inputs in (torch.ones(5, 128).bfloat16(), torch.ones(1, 64).bfloat16(), torch.ones(1, 128)):
        assert not packed.can_decode(inputs.to(DEVICE), None)
