"""Packed weights, and the kernels on them: in Triton's interpreter, or on the GPU that a test may see."""

import torch
from torch import Tensor

from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.rounding import pack_rounded, restore_rows
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.runtime.packed_linear import PackedLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/__init__.py chooses the interpreter
TARGETS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), Unstructured(0.95), NofM(2, 4), NofM(4, 8), NofM(1, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Sums are float32; outputs of bfloat16 and float16 are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an item


def bits(weight: Tensor) -> Tensor:
    """A weight's bits as integers."""
    return weight.view(INTEGERS[weight.element_size()])


def pruned(rows: int, columns: int, target: Pattern, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, columns).to(dtype)
    return apply_mask(weight, initial_mask(weight.float().abs(), target, Granularity.LINEAR))


def packed_linear(weight: Tensor, bias: bool = False) -> PackedLinear:
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, torch.nn.Parameter(torch.randn(len(weight)).to(weight.dtype)) if bias else None)


def rounded_linear(weight: Tensor, group: int, bias: bool = False) -> tuple[PackedLinear, Tensor]:
    """A linear with int8 values, and its weight, not rounded to a dtype: float64, (out, in)."""
    rounded = pack_rounded(weight, group)
    assert rounded is not None
    linear = PackedLinear(rounded, torch.nn.Parameter(torch.randn(len(weight)).to(weight.dtype)) if bias else None)
    quotients = torch.zeros(weight.shape, dtype=torch.int8)
    quotients[weight != 0] = rounded.values
    return linear, restore_rows(quotients, rounded.scales, group, torch.float32).double()


def check_product(linear: PackedLinear, weight: Tensor, inputs: Tensor) -> None:
    """Compare the decode kernels' product with that of float64."""
    with torch.no_grad():
        output = linear.to(DEVICE).gpu_weight().decode(inputs.to(DEVICE), linear.bias).cpu()
    linear.cpu()
    bias = None if linear.bias is None else linear.bias.double()
    expected = torch.nn.functional.linear(inputs.double(), weight.double(), bias)
    assert output.shape == expected.shape
    assert output.dtype == inputs.dtype
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[inputs.dtype], atol=1e-4, equal_nan=True)
