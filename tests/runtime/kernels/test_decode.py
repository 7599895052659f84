"""The decode kernels against the product in float64: in Triton's interpreter, or on a GPU where there is one."""

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.masking.pattern import Pattern, Unstructured
from llm_barber.runtime.kernels import decode, decode_rows
from llm_barber.runtime.kernels.decode import divide, divide_steps
from llm_barber.runtime.kernels.decode_rows import divide_tiles
from llm_barber.runtime.on_gpu import GROUPS
from tests.helpers.kernels import launches
from tests.runtime.kernels.packing import (
    DEVICE,
    TARGETS,
    check_product,
    packed_linear,
    pruned,
    rounded_linear,
)

HALF = Unstructured(0.5)


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that a few lanes fill: programs take several rows and steps, so that the interpreter has few programs."""
    torch.manual_seed(0)
    if "as_on_gpus" not in request.fixturenames:
        monkeypatch.setattr(decode, "THREADS", 1)


@pytest.fixture
def as_on_gpus() -> None:
    """Divide weights as on a real GPU."""


@pytest.mark.parametrize(
    ("target", "dtype"),
    [*((target, torch.bfloat16) for target in TARGETS), (HALF, torch.float16), (HALF, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 2])
def test_equals_the_dense_product(target: Pattern, dtype: torch.dtype, tokens: int) -> None:
    weight = pruned(6, 320, target, dtype)
    check_product(packed_linear(weight), weight, torch.randn(tokens, 320).to(dtype))


@pytest.mark.parametrize(
    ("columns", "group", "dtype"),
    [
        (320, 128, torch.float32), (320, 32, torch.float16), (384, 96, torch.bfloat16), (200, 64, torch.bfloat16),
        (90, 128, torch.bfloat16), (1100, 1024, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 4])
def test_values_rounded_to_int8(dtype: torch.dtype, columns: int, group: int, tokens: int) -> None:
    """Products have the values times their scales, which are not rounded to the weight's dtype first."""
    linear, weight = rounded_linear(pruned(6, columns, HALF, dtype), group, bias=True)
    check_product(linear, weight, torch.randn(tokens, columns).to(dtype))


@pytest.mark.parametrize("tokens", [1, 4])
def test_no_scale_is_read_beyond_the_last(tokens: int) -> None:
    """Rows of 96 columns end within a word of the mask: what lies behind the last scale must not reach an output."""
    linear, weight = rounded_linear(pruned(6, 96, HALF, torch.bfloat16), 32)
    scales = torch.full((linear.scales.numel() + 64,), -1, dtype=torch.int16)  # NaN behind them
    linear.scales = scales[: linear.scales.numel()].copy_(linear.scales.view(-1)).view(linear.scales.shape)
    check_product(linear, weight, torch.randn(tokens, 96).bfloat16())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1500), (17, 7), (5, 256), (18, 257), (16, 511), (3, 13)])
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float32), (4, torch.float32), (3, torch.bfloat16), (16, torch.float16)]
)
def test_ragged_shapes(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    weight = pruned(rows, columns, Unstructured(0.7), dtype)
    linear = packed_linear(weight, bias=True)
    check_product(linear, weight, torch.randn(tokens, columns).to(dtype))
    check_product(linear, weight, torch.randn(columns, tokens).to(dtype).T)  # not contiguous


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "bias"), [(4000, False), (8192, True)])
def test_split_columns_are_added(tokens: int, dtype: torch.dtype, bias: bool, columns: int) -> None:
    weight = pruned(2, columns, HALF, dtype)
    divided = divide(2, columns) if tokens == 1 or dtype == torch.float32 else divide_tiles(2, columns, 0)
    assert (divided.splits > 1) == (columns == 8192 or divided.height == 16)
    check_product(packed_linear(weight, bias), weight, torch.randn(tokens, columns).to(dtype))
    linear, rounded = rounded_linear(weight, 128, bias)
    check_product(linear, rounded, torch.randn(tokens, columns).to(dtype))


@pytest.mark.usefixtures("as_on_gpus")
def test_two_products_of_the_same_are_the_same() -> None:
    weight = pruned(2, 8192, HALF, torch.bfloat16)
    linear = packed_linear(weight).to(DEVICE)
    for tokens in (1, 6):
        inputs = torch.randn(tokens, 8192, device=DEVICE).bfloat16()
        outputs = [linear.gpu_weight().decode(inputs, None) for _ in range(2)]
        assert torch.equal(*outputs)


def test_other_dimensions_and_limits() -> None:
    weight = pruned(8, 24, Unstructured(0.6), torch.float32)
    linear = packed_linear(weight, bias=True)
    check_product(linear, weight, torch.randn(24))
    check_product(linear, weight, torch.randn(2, 1, 24))
    check_product(packed_linear(weight.half()), weight.half(), torch.randn(2, 3, 24).half())
    assert GROUPS // decode.CHUNK >= 4  # lanes of a group of int8 values: Triton's interpreter wants 16 columns
    with pytest.raises(ValueError, match="5 rows of inputs, the kernels take 1 to 4"):
        linear.to(DEVICE).gpu_weight().decode(torch.randn(5, 24, device=DEVICE), None)


def test_inputs_that_begin_anywhere_in_memory() -> None:
    weight = pruned(6, 128, HALF, torch.bfloat16)
    check_product(packed_linear(weight), weight, torch.randn(129).bfloat16()[1:])


def test_rows_with_nothing_and_with_everything() -> None:
    weight = torch.zeros(9, 300).half()
    weight[3] = torch.arange(1.0, 301)
    weight[8, 299] = 5
    nothing = torch.zeros(4, 8).half()
    for tokens in (1, 2):
        check_product(packed_linear(weight), weight, torch.ones(tokens, 300).half())
        check_product(packed_linear(nothing), nothing, torch.ones(tokens, 8).half())


def test_wide_starts() -> None:
    """Starts of rows beyond 2¹⁶ columns."""
    weight = pruned(1, 66_000, HALF, torch.float32)
    check_product(packed_linear(weight), weight, torch.randn(1, 66_000) / 100)


@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_special_inputs_spread_as_in_a_dense_product(special: float) -> None:
    """A pruned weight is a zero, and zero times infinity is NaN."""
    weight = pruned(6, 64, HALF, torch.float16)
    for tokens in (1, 2):
        inputs = torch.randn(tokens, 64).half()
        inputs[0, 5] = special
        check_product(packed_linear(weight), weight, inputs)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_launch_goes_to_the_device_of_the_weight(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    linear = packed_linear(pruned(6, 600, HALF, torch.bfloat16))
    module, name = (decode, "_decode") if tokens == 1 else (decode_rows, "_decode_rows")
    events = launches(monkeypatch, module, name)
    linear.gpu_weight().decode(torch.ones(tokens, 600).bfloat16(), None)
    assert events == [linear.values, "launch", linear.values]


@pytest.mark.usefixtures("as_on_gpus")
def test_how_weights_are_divided() -> None:
    """Few programs where the weight is large, many where it is small; no lane beyond a tenth has nothing to do."""
    assert tuple(vars(divide(4096, 4096)).values()) == (4, 128, 1, 4)
    assert tuple(vars(divide(1024, 4096)).values()) == (1, 128, 1, 4)
    assert tuple(vars(divide(576, 576)).values()) == (1, 32, 1, 3)
    assert tuple(vars(divide(128, 8192)).values()) == (1, 128, 2, 4)
    assert divide_steps(1 << 20, 100) == (1, 100)
    assert divide_steps(1, 100) == (16, 7)
    for rows in (1, 7, 576, 4096, 32000):
        for columns in (8, 576, 1536, 4096, 11008):
            divided = divide(rows, columns)
            chunks = -(-columns // 64) * 8
            assert divided.splits * divided.steps * divided.lanes >= chunks
            assert (divided.splits - 1) * divided.steps * divided.lanes < chunks
