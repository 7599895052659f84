"""The unpacking kernel against the packed weight: in Triton's interpreter, or on a GPU where there is one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_barber.checkpoint.encoding import pack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.runtime import packed_linear as module
from llm_barber.runtime.packed_linear import DECODE_ROWS, PackedLinear, block_starts
from tests.conftest import bits
from tests.helpers.kernels import compile_kernel, launches

kernel = pytest.importorskip(
    "llm_barber.runtime.kernels.unpack",
    reason="the unpacking kernel is tested where Triton is: pip install '.[gpu]'",
    exc_type=ImportError,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/__init__.py chooses the interpreter


def packed_linear(weight: Tensor) -> PackedLinear:
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, None)


def check(weight: Tensor) -> None:
    """Compare bits: −0.0 and NaN are values as others are, and what is pruned is +0.0."""
    unpacked = packed_linear(weight).to(DEVICE).unpack().cpu()
    assert unpacked.dtype == weight.dtype
    assert torch.equal(bits(unpacked), bits(weight))


@pytest.mark.parametrize("target", [Unstructured(0.5), Unstructured(0.9), NofM(2, 4), NofM(1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_weight_bit_for_bit(target: Pattern, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(apply_mask(weight, initial_mask(weight.float().abs(), target, Granularity.LINEAR)))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (17, 7), (5, 256), (33, 257), (16, 511), (3, 13), (19, 40)])
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


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_starts_of_either_kind(kind: torch.dtype) -> None:
    weight = torch.randn(6, 600).masked_fill(torch.rand(6, 600) < 0.6, 0)
    linear = packed_linear(weight).to(DEVICE)
    starts = block_starts(linear.bits, linear.shape, 256).to(kind)
    assert torch.equal(kernel.unpack(linear.values, linear.bits, starts, linear.shape, 256).cpu(), weight)


def test_many_rows_of_inputs_are_multiplied_with_the_unpacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 600).masked_fill(torch.rand(6, 600) < 0.6, 0)
    linear = packed_linear(weight)
    monkeypatch.setattr(module, "has_kernels", lambda _: True)
    events = launches(monkeypatch, kernel, "_unpack")
    assert linear.weight.shape == (6, 600)
    assert events == [linear.values, "launch", linear.values]
    assert module.use_kernel("cuda", DECODE_ROWS, differentiated=False)
    assert not module.use_kernel("cuda", DECODE_ROWS + 1, differentiated=False)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles_for_a_gpu_within_its_budget(tmp_path: Path, capability: int) -> None:
    """A warp takes a row of 256 columns, so that a lane has 8 weights of its own, and stores them at once."""
    kinds = {"values": "*bf16", "bits": "*u8", "starts": "*i32", "weight": "*bf16"}
    kinds |= dict.fromkeys(["rows", "columns"], "i32")
    code = compile_kernel(kernel, "_unpack", kinds, {"width": 256, "height": 4}, capability, tmp_path)
    assert code.spills == 0
    assert code.barriers == 0
    assert code.count("STG") == code.count("STG.E.128") == 1
    assert len(code.names) / 8 <= 28  # instructions a weight
