"""The decode kernel against the dense product: in Triton's interpreter, or on a GPU where there is one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_barber.checkpoint.encoding import pack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.runtime.packed_linear import DECODE_ROWS, PackedLinear, block_starts
from tests.helpers.kernels import compile_kernel, launches

kernel = pytest.importorskip(
    "llm_barber.runtime.kernels.decode",
    reason="the decode kernel is tested where Triton is: pip install '.[gpu]'",
    exc_type=ImportError,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/__init__.py chooses the interpreter
TARGETS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7), Unstructured(0.6), NofM(2, 4), NofM(4, 8), NofM(1, 4)]


def packed_linear(
    rows: int, columns: int, target: Pattern, dtype: torch.dtype, bias: bool
) -> tuple[PackedLinear, Tensor]:
    weight = torch.randn(rows, columns).to(dtype)
    weight = apply_mask(weight, initial_mask(weight.float().abs(), target, Granularity.LINEAR))
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, torch.nn.Parameter(torch.randn(rows).to(dtype)) if bias else None), weight


def check(linear: PackedLinear, weight: Tensor, inputs: Tensor) -> None:
    with torch.no_grad():
        output = linear.to(DEVICE).decode(inputs.to(DEVICE)).cpu()
    linear.cpu()
    bias = None if linear.bias is None else linear.bias.double()
    expected = torch.nn.functional.linear(inputs.double(), weight.double(), bias)
    assert output.shape == expected.shape
    assert output.dtype == inputs.dtype
    # Sums are float32; bfloat16 and float16 outputs are rounded once.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[inputs.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_dense_product(target: Pattern, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, weight = packed_linear(24, 320, target, dtype, bias=False)
    check(linear, weight, torch.randn(1, 320).to(dtype))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (17, 7), (5, 256), (33, 257), (16, 511), (3, 13), (19, 40)])
@pytest.mark.parametrize("tokens", [1, 3, DECODE_ROWS])
def test_ragged_shapes(rows: int, columns: int, tokens: int) -> None:
    torch.manual_seed(rows)
    linear, weight = packed_linear(rows, columns, Unstructured(0.7), torch.float32, bias=True)
    check(linear, weight, torch.randn(tokens, columns))
    check(linear, weight, torch.randn(columns, tokens).T)  # not contiguous


def test_other_dimensions_and_limits() -> None:
    linear, weight = packed_linear(20, 24, Unstructured(0.6), torch.float32, bias=True)
    check(linear, weight, torch.randn(24))
    check(linear, weight, torch.randn(2, 3, 24))
    assert kernel.MOST_ROWS == DECODE_ROWS
    with pytest.raises(ValueError, match="9 rows"):
        linear.to(DEVICE).decode(torch.randn(9, 24, device=DEVICE))


def test_rows_with_nothing_and_with_everything() -> None:
    weight = torch.zeros(9, 300)
    weight[3] = torch.arange(1.0, 301)
    weight[8, 299] = 5
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, None)
    check(linear, weight, torch.ones(2, 300))
    nothing = pack(torch.zeros(4, 8))
    assert nothing is not None
    check(PackedLinear(nothing, None), torch.zeros(4, 8), torch.ones(1, 8))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_starts_of_either_kind(kind: torch.dtype) -> None:
    linear, weight = packed_linear(6, 600, Unstructured(0.5), torch.float32, bias=False)
    starts, inputs = block_starts(linear.bits, linear.shape, 256).to(kind), torch.randn(2, 600)
    parts = (tensor.to(DEVICE) for tensor in (linear.values, linear.bits, starts, inputs))
    output = kernel.decode_product(*parts, None, 256).cpu()
    torch.testing.assert_close(output, inputs @ weight.T, rtol=1e-5, atol=1e-4)


def test_a_launch_goes_to_the_device_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _ = packed_linear(6, 600, Unstructured(0.5), torch.float32, bias=False)
    events = launches(monkeypatch, kernel, "_decode")
    linear.decode(torch.ones(1, 600))
    assert events == [linear.values, "launch", linear.values]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles_for_a_gpu(tmp_path: Path, capability: int) -> None:
    """The interpreter takes more than the compiler does; compiling needs no GPU."""
    pointers = {**dict.fromkeys(["values", "inputs", "bias", "outputs"], "*bf16"), "bits": "*u8", "starts": "*i32"}
    numbers = dict.fromkeys(["tokens", "rows", "columns", "blocks"], "i32")
    for together in (1, 8):
        constants = {"width": 256, "height": kernel.PRODUCTS // together, "together": together, "has_bias": True}
        code = compile_kernel(kernel, "_decode", {**pointers, **numbers}, constants, capability, tmp_path)
        assert code.spills == 0
