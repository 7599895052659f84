"""Linears that keep int8 values in memory, against the dense linear of the unpacked weight."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_barber import PackConfig, PruneConfig, load, native, pack, prune
from llm_barber.checkpoint.rounding import pack_rounded, unpack_rounded
from llm_barber.native import Instructions, amx
from llm_barber.native.rounded import DTYPES, Kernel, best_kernel, find_kernel
from llm_barber.runtime import products
from llm_barber.runtime.rounded_linear import RoundedLinear
from tests.conftest import make_model, save_tokens


@pytest.fixture(params=Kernel, ids=lambda kernel: kernel.name, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The fastest code that products may use."""
    if request.param > best_kernel():
        pytest.skip(f"needs {request.param.name}")
    if request.param == Kernel.NUMPY:
        monkeypatch.setattr(native, "library", lambda: None)
    elif request.param == Kernel.AVX2:
        monkeypatch.setattr(native, "instructions", lambda: Instructions.AVX2)
    return Kernel(request.param)


def make_linear(
    rows: int, columns: int, dtype: torch.dtype, bias: bool = True, group: int = 128
) -> tuple[RoundedLinear, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.5, 0).to(dtype)
    rounded = pack_rounded(weight, group)
    assert rounded is not None
    parameter = nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False) if bias else None
    return RoundedLinear(rounded, parameter), unpack_rounded(rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "group"), [(192, 128), (200, 64), (90, 128), (96, 32)])
def test_few_rows_are_near_and_more_are_as_by_the_dense_weight(dtype: torch.dtype, columns: int, group: int) -> None:
    used = find_kernel(columns, group) if dtype in DTYPES else Kernel.NUMPY
    for bias in (False, True):
        linear, weight = make_linear(48, columns, dtype, bias, group)
        assert torch.equal(linear.weight, weight)
        for rows in (1, 4, 5, 8, 9, 40):
            inputs = torch.randn(rows, columns).to(dtype)
            expected = nn.functional.linear(inputs, weight, linear.bias)
            outputs = linear(inputs)
            assert outputs.dtype == dtype
            distance, size = (outputs - expected).double().norm(), expected.double().norm()
            if rows > used.rows and used == Kernel.VNNI and dtype == torch.bfloat16 and amx.multiplies_int8():
                assert distance < 0.003 * size  # sums have another order
            elif rows > used.rows:
                assert torch.equal(outputs, expected)
            elif used == Kernel.VNNI:  # inputs are rounded
                assert 0 < distance < 0.015 * size
            else:  # a weight is not rounded to bfloat16, and sums have another order
                assert distance < (0.005 if dtype == torch.bfloat16 else 1e-6) * size
        batched = torch.randn(2, 3, columns).to(dtype)
        assert torch.equal(linear(batched).view(6, -1), linear(batched.view(6, columns)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [16, 100, 257])
def test_blocks_equal_the_whole(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, and blocks between."""
    monkeypatch.setattr(products, "SHARED_ROWS", 16)
    for dtype in DTYPES:
        linear, weight = make_linear(rows, 128, dtype, bias)
        inputs = torch.randn(3, 11, 128).to(dtype)
        expected = nn.functional.linear(inputs, weight, linear.bias)
        for cached in (1, 10_000):
            monkeypatch.setattr(products, "UNPACKED_BYTES", cached)
            torch.testing.assert_close(linear(inputs), expected, rtol=1e-2, atol=1e-2)


def test_gradients_of_inputs() -> None:
    linear, weight = make_linear(16, 128, torch.float32)
    inputs = torch.randn(2, 128, requires_grad=True)
    linear(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(2, -1))


def test_copies_and_other_dtypes() -> None:
    linear, weight = make_linear(16, 128, torch.bfloat16)
    inputs = torch.randn(1, 128).bfloat16()
    expected = linear(inputs)
    other = copy.deepcopy(linear)
    linear.values.zero_()
    assert torch.equal(other(inputs), expected)
    other.to(torch.float32)
    assert other.scales.dtype == torch.int16  # scales are as they were
    assert torch.equal(other.weight, weight.float())
    assert torch.equal(other.dense().weight, weight.float())
    torch.testing.assert_close(other(inputs.float()), expected.float(), rtol=0.01, atol=0.05)
    fresh, _ = make_linear(16, 128, torch.bfloat16)
    fresh(inputs)
    fresh.load_state_dict({**fresh.state_dict(), "scales": fresh.scales * 0})
    assert torch.equal(fresh(inputs)[0], fresh.bias)


def test_a_packed_model_keeps_rounded_values(tmp_path: Path) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings = {"calibration": tokens, "sparsity": 0.5, "initial": "wanda", "rebuild": False, "report": False}
    prune(PruneConfig(model=model, output=tmp_path / "pruned", **settings))
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "packed", values="int8"))
    ids = torch.arange(20)[None]
    for dtype in (None, torch.float32):
        dense, kept = load(tmp_path / "packed", dtype=dtype), load(tmp_path / "packed", keep_packed=True, dtype=dtype)
        linears = [module for module in kept.modules() if isinstance(module, RoundedLinear)]
        assert len(linears) == 14
        size = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
        weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
        assert 5 < 8 * size / weights < 5.5
        with torch.no_grad():
            expected = dense(ids).logits
            many = kept(ids).logits  # 20 rows of inputs: inputs are not rounded
            few = kept(ids[:, :1]).logits
        if dtype == torch.bfloat16 and amx.multiplies_int8():  # sums have another order
            assert (many - expected).float().norm() < 0.01 * expected.float().norm()
        else:
            assert torch.equal(many, expected)
        assert (few - expected[:, :1]).float().norm() < 0.05 * expected[:, :1].float().norm()
