"""Products with int8 values by AVX2, and unpacking, against float64; arrays that end at a page."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from llm_barber import native
from llm_barber.checkpoint.rounding import Rounded, unpack_rounded
from llm_barber.native import Instructions, rounded
from llm_barber.native.rounded import Kernel, Weight, best_kernel, find_kernel
from llm_barber.native.rows import BLOCK_ROWS, Parts
from tests.helpers.guarded import guarded
from tests.helpers.threads import check_threads_and_fork
from tests.native.test_unrounded import make_weight
from tests.native.test_vnni import SHAPES, dense_values, pack, weight_of

pytestmark = pytest.mark.skipif(best_kernel() < Kernel.AVX2, reason="needs the C extension, and AVX2")


@pytest.fixture(autouse=True)
def _without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instructions", lambda: Instructions.AVX2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("group", [8, 24, 64, 128, 1024])
def test_products_are_those_of_values_times_scales(
    dtype: torch.dtype, sparsity: float, rows: int, columns: int, group: int
) -> None:
    weight = pack(make_weight(rows, columns, sparsity, dtype), group)
    dense = dense_values(weight) * weight.scales.double().numpy().repeat(group, 1)[:, :columns]
    for tokens in (1, 2, 3, 4):
        inputs = make_weight(tokens, columns, 0.1, dtype, seed=tokens)
        exact = inputs.double().numpy()
        sizes = np.abs(exact) @ np.abs(dense).T
        for bias in (None, make_weight(1, rows, 0, dtype)[0]):
            outputs = weight_of(weight, bias, dtype, 1 + rows % 3).multiply(inputs)
            target = exact @ dense.T + (0 if bias is None else bias.double().numpy())
            rounding = 2**-8 * np.abs(target) if dtype == torch.bfloat16 else 0
            assert outputs.dtype == dtype
            assert (np.abs(outputs.double().numpy() - target) <= 2e-6 * (sizes + np.abs(target)) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (70, 128)])
@pytest.mark.parametrize("group", [8, 64, 1024])
def test_weights_are_unpacked_bit_for_bit(dtype: torch.dtype, rows: int, columns: int, group: int) -> None:
    for size in (1.0, 1e-38, 1e38):
        weight = (make_weight(rows, columns, 0.5, torch.float32) * size).clamp(-3e38, 3e38).to(dtype)
        packed = pack(weight, group)
        for scales in (packed.scales, torch.full_like(packed.scales, torch.finfo(torch.bfloat16).max)):
            hostile = Rounded(packed.packed, scales, group, dtype)
            kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
            expected = unpack_rounded(hostile).view(kind)
            ready = weight_of(hostile, None, dtype, min(rows, 3), place=guarded)
            for first in range(0, rows, BLOCK_ROWS):
                for end in {*range(first, rows, BLOCK_ROWS), rows}:
                    into = guarded(torch.full((end - first, columns), 7, dtype=dtype))
                    ready.unpack(first, end, into)
                    assert torch.equal(into.view(kind), expected[first:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8, 56, 64, 72, 128, 200])
def test_nothing_is_read_behind_an_array(dtype: torch.dtype, columns: int) -> None:
    """A read beyond an array ends the process: every array ends where a page does."""
    for sparsity in (0.2, 0.5, 0.95, 1.0):
        for rows in (1, 5):
            packed = pack(make_weight(rows, columns, sparsity, dtype), 64)
            restored = unpack_rounded(packed)
            weight = weight_of(packed, restored[:, 0].contiguous(), dtype, place=guarded)
            inputs = guarded(make_weight(3, columns, 0, torch.float32, seed=1))
            outputs = guarded(torch.zeros(3, rows, dtype=dtype))
            weight._multiply(weight._address, inputs.data_ptr(), outputs.data_ptr(), 3)
            expected = inputs.double() @ restored.double().T + restored[:, 0].double()
            torch.testing.assert_close(outputs.double(), expected, rtol=1e-2, atol=0.1)
            into = guarded(torch.empty(rows, columns, dtype=dtype))
            weight.unpack(0, rows, into)
            assert torch.equal(into, restored)


def test_a_mask_with_more_bits_than_values_reads_nothing_behind_them() -> None:
    """A file whose mask lies: the weights without a value are zero."""
    values, bits = guarded(torch.ones(40, dtype=torch.int8)), torch.full((32,), 255, dtype=torch.uint8)
    scales = torch.ones(4, 1).bfloat16().view(torch.int16)
    weight = Weight(values, bits, scales, None, 64, 64, torch.float32, Parts((0, 4), (0, 40), np.array([0, 40])))
    assert weight.multiply(torch.ones(1, 64)).tolist() == [[40, 0, 0, 0]]
    into = torch.full((4, 64), 7.0)
    weight.unpack(0, 4, into)
    assert into.sum(1).tolist() == [40, 0, 0, 0]


def test_inputs_that_are_not_finite_give_what_a_dense_linear_gives() -> None:
    packed = pack(make_weight(6, 128, 0.5, torch.float32), 64)
    inputs = torch.zeros(3, 128)
    inputs[0, 3], inputs[1, 100], inputs[2] = float("inf"), float("nan"), 1e-36
    outputs = weight_of(packed, None, torch.float32).multiply(inputs)
    expected = nn.functional.linear(inputs, unpack_rounded(packed))
    torch.testing.assert_close(outputs, expected, equal_nan=True, rtol=1e-4, atol=0)


def test_threads_give_the_same_sums() -> None:
    """Sums by any number of threads, from several callers at once, and after a fork."""
    packed, inputs = pack(make_weight(61, 256, 0.5, torch.float32), 128), make_weight(2, 256, 0, torch.float32, seed=1)
    alone = weight_of(packed, None, torch.float32).multiply(inputs)
    for parts in (2, 3, 4, 61):
        weight = weight_of(packed, None, torch.float32, parts)
        assert torch.equal(weight.multiply(inputs), alone)
    check_threads_and_fork(lambda: weight.multiply(inputs), alone)


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of(pack(make_weight(4, 128, 0.5, torch.float32), 64), None, torch.float32)
    for inputs in (torch.ones(1, 64), torch.ones(5, 128), torch.ones(1, 128).bfloat16(), torch.ones(0, 128)):
        with pytest.raises(ValueError, match="inputs do not fit"):
            weight.multiply(inputs)
    for first, end, into in (
        (0, 4, torch.ones(4, 64)), (0, 4, torch.ones(4, 128).bfloat16()), (0, 4, torch.ones(128, 4).T),
        (0, 8, torch.ones(8, 128)), (1, 4, torch.ones(3, 128)), (0, 3, torch.ones(3, 128)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unpacked"):
            weight.unpack(first, end, into)


class OldLibrary:
    """A library that was built before there were functions for int8 values."""


@pytest.mark.parametrize(
    ("library", "kernel", "words"),
    [
        (native.library(), Kernel.AVX2, "by AVX2, since the processor lacks AVX-512 with VBMI2 and VNNI"),
        (OldLibrary(), Kernel.NUMPY, "by NumPy for every product, since the C extension is missing or old"),
        (None, Kernel.NUMPY, "by NumPy for every product"),
    ],
)
def test_what_is_used_is_said_once(
    library: object, kernel: Kernel, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda: library)
    rounded._report.cache_clear()
    with caplog.at_level(logging.INFO, logger="llm_barber"):
        assert [find_kernel(64, 64), find_kernel(64, 8), find_kernel(128, 128)] == [kernel] * 3
        assert find_kernel(60, 64) == find_kernel(64, 12) == Kernel.NUMPY
    assert [words in record.message for record in caplog.records] == [True]
