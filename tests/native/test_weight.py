"""Products with packed weights, and unpacking, in C against NumPy and float64; every array ends where a page does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.encoding import bitmask
from llm_barber.checkpoint.rounding import Rounded, pack_rounded, unpack_rounded
from llm_barber.native import Instructions
from llm_barber.native.weight import AVX2_ROWS, BLOCK_ROWS, Parts, Weight
from tests.helpers.guarded import guard_products, guarded
from tests.helpers.threads import check_threads_and_fork

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="src/llm_barber/native is not built here: pip install -e . with a C compiler"
)
FLOATS = (torch.bfloat16, torch.float32)
SHAPES = [(1, 8), (3, 24), (7, 64), (33, 200), (12, 1000), (200, 136)]


@pytest.fixture(params=Instructions, ids=lambda level: level.name)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Instructions:
    """Each level of instructions that the processor has."""
    if request.param > native.processor_instructions():
        pytest.skip(f"needs {request.param.name}")
    monkeypatch.setattr(native, "instructions", lambda: request.param)
    return Instructions(request.param)


def make_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)


def float_weight(weight: Tensor, bias: Tensor | None = None, parts: int = 1) -> Weight:
    kept, shape = weight != 0, (weight.shape[0], weight.shape[1])
    bits = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    tensors = guarded(weight[kept]), guarded(bits), None, None if bias is None else guarded(bias)
    return Weight(*tensors, shape, 0, weight.dtype, Parts.of(bits, shape, parts))


def rounded(weight: Tensor, group: int) -> Rounded:
    result = pack_rounded(weight, group)
    assert result is not None
    return result


def int8_weight(
    packed: Rounded, bias: Tensor | None = None, parts: int = 1, dtype: torch.dtype | None = None
) -> Weight:
    bits = torch.from_numpy(bitmask(packed.packed))
    tensors = guarded(packed.values), guarded(bits), guarded(packed.scales.view(torch.int16).clone())
    placed = None if bias is None else guarded(bias)
    return Weight(
        *tensors, placed, packed.shape, packed.group, dtype or packed.dtype, Parts.of(bits, packed.shape, parts)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_products_equal_dense_ones(
    level: Instructions, dtype: torch.dtype, rows: int, columns: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are float32, outputs are rounded once; several threads."""
    guard_products(monkeypatch)
    weight = make_weight(rows, columns, sparsity, dtype)
    for bias in (None, make_weight(1, rows, 0, dtype)[0]):
        for parts in (1, min(rows, 3)):
            ready = float_weight(weight, bias, parts)
            for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 40)[: 4 if ready.most_rows == AVX2_ROWS else 8]:
                inputs = guarded(make_weight(tokens, columns, 0.1, dtype, seed=tokens))
                outputs = ready.multiply(inputs)
                expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
                sizes = inputs.double().abs() @ weight.double().abs().T + 1
                rounding = 2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
                assert ((outputs.double() - expected).abs() <= 2e-6 * sizes + rounding).all()
                assert outputs.dtype == dtype


def test_bfloat16_outputs_are_rounded_to_nearest_even(level: Instructions) -> None:
    """Sums of 256 and small numbers, of which bfloat16 keeps eight bits; infinities and NaN stay so."""
    weight = torch.tensor([[1, value] + [0] * 6 for value in (1, 1.5, 3, 2, -1, torch.inf, torch.nan)]).bfloat16()
    outputs = float_weight(weight).multiply(torch.tensor([[256] + [1] * 7]).bfloat16())
    assert outputs[0, :6].tolist() == [256, 258, 260, 258, 255, torch.inf]
    assert outputs[0, 6].isnan()


def round_inputs(inputs: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers, int64, and float32 scales of each row's groups, both (tokens, in), operation by operation."""
    values = inputs.float().numpy()
    whole, scales = np.zeros(values.shape, np.int64), np.zeros(values.shape, np.float32)
    for row, row_whole, row_scales in zip(values, whole, scales, strict=True):
        for start in range(0, values.shape[1], group):
            part, largest = slice(start, start + group), np.abs(row[start : start + group]).max()
            if largest > 0:
                row_scales[part] = largest / np.float32(127)
                row_whole[part] = np.rint(row[part] * (np.float32(127) / largest))
    return whole, scales


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("sparsity", "group"), [(0.2, 64), (0.5, 128), (0.95, 1024), (0.5, 24)])
def test_int8_products_are_those_of_integers(
    level: Instructions, dtype: torch.dtype, rows: int, columns: int, sparsity: float, group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By VNNI inputs are rounded; by AVX2, as for groups that VNNI does not take, they are not."""
    guard_products(monkeypatch)
    packed = rounded(make_weight(rows, columns, sparsity, dtype), group)
    quotients = np.zeros(rows * columns)
    quotients[np.unpackbits(bitmask(packed.packed), count=rows * columns, bitorder="little") > 0] = packed.values
    weight = quotients.reshape(rows, columns) * packed.scales.double().numpy().repeat(group, 1)[:, :columns]
    for bias in (None, make_weight(1, rows, 0, dtype)[0]):
        ready = int8_weight(packed, bias, min(rows, 3))
        by_vnni = level > Instructions.AVX2 and (group % 64 == 0 or group >= columns)
        for tokens in range(1, (9 if by_vnni else 5)):
            inputs = guarded(make_weight(tokens, columns, 0.1, dtype, seed=tokens))
            whole, scales = round_inputs(inputs, group)
            used = whole * scales.astype(np.float64) if by_vnni else inputs.double().numpy()
            expected = used @ weight.T + (0 if bias is None else bias.double().numpy())
            sizes = np.abs(used) @ np.abs(weight).T + np.abs(expected)
            rounding = 2**-8 * np.abs(expected) if dtype == torch.bfloat16 else 0
            assert (np.abs(ready.multiply(inputs).double().numpy() - expected) <= 2e-6 * sizes + rounding).all()


def test_integer_sums_are_exact(level: Instructions) -> None:
    """Scales of 1: outputs are the sums, and equal integers; the largest sums of all are among them."""
    generator = np.random.default_rng(0)
    values, whole = generator.integers(-127, 128, (9, 256)), generator.integers(-127, 128, (4, 256))
    values[:, ::2], values[0, 1::2], values[1, 1::2] = 0, 127, -127
    values[2:, 1] = values[2:, 129] = whole[:, 0] = whole[:, 128] = 127  # the largest of each group
    whole[0], whole[1] = 127, -127
    outputs = int8_weight(rounded(torch.from_numpy(values).float(), 128)).multiply(torch.from_numpy(whole).float())
    assert np.array_equal(outputs.numpy().astype(np.int64), whole @ values.T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_products_of_inputs_without_a_scale(level: Instructions, dtype: torch.dtype) -> None:
    inputs = torch.zeros(4, 128, dtype=dtype)
    inputs[1], inputs[2, 3], inputs[3, 100] = 1e-36, torch.inf, torch.nan
    outputs = int8_weight(
        rounded(make_weight(6, 128, 0.3, dtype).index_fill_(1, torch.tensor([3, 100]), 1), 64)
    ).multiply(inputs)
    assert (outputs[:2].abs() < 1e-30).all()
    assert not outputs[2:].isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 24), (47, 136), (70, 128)])
def test_rows_are_unpacked_bit_for_bit(level: Instructions, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Rows in any blocks, on three threads; scales of all sizes, and scales that lie."""

    def check(ready: Weight, expected: Tensor) -> None:
        for first in range(0, rows, BLOCK_ROWS):
            for end in {*range(first, rows, BLOCK_ROWS), rows}:
                into = guarded(torch.full((end - first, columns), 7, dtype=dtype))
                ready.unpack(first, end, into)
                kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
                assert torch.equal(into.view(kind), expected[first:end].view(kind))

    weight = make_weight(rows, columns, 0.5, torch.float32)
    check(float_weight(weight.to(dtype), parts=min(rows, 3)), weight.to(dtype))
    for size in (1.0, 1e-38, 2.0**-90, 2.0**102, 1e38):
        for group in (64, 24):
            packed = rounded((weight * size).clamp(-3e38, 3e38).to(dtype), group)
            for scales in (packed.scales, torch.full_like(packed.scales, torch.finfo(torch.bfloat16).max)):
                hostile = Rounded(packed.packed, scales, group, dtype)
                check(int8_weight(hostile, parts=min(rows, 3)), unpack_rounded(hostile))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_a_mask_with_more_bits_than_values_reads_nothing_behind_them(level: Instructions, dtype: torch.dtype) -> None:
    """A file whose mask lies: weights without a value are zero, also where several rows are multiplied at once."""
    computed = torch.float32 if dtype == torch.int8 else dtype
    for rows in (4, 64):
        values, bits = guarded(torch.ones(40, dtype=dtype)), guarded(torch.full((rows * 8,), 255, dtype=torch.uint8))
        scales = torch.ones(rows, 1).bfloat16().view(torch.int16) if dtype == torch.int8 else None
        parts = Parts((0, rows), (0, 40), np.array([0] + [40] * -(-rows // BLOCK_ROWS)))
        ready = Weight(values, bits, scales, None, (rows, 64), 64 if dtype == torch.int8 else 0, computed, parts)
        for tokens in (1, 3, 16):
            if tokens <= ready.most_rows:
                outputs = ready.multiply(torch.ones(tokens, 64, dtype=computed)).round()
                assert outputs.tolist() == [[40] + [0] * (rows - 1)] * tokens
        unpacked = torch.ones(rows, 64, dtype=computed)
        ready.unpack(0, rows, unpacked)
        assert unpacked.flatten().tolist() == [1] * 40 + [0] * (rows * 64 - 40)


@pytest.mark.parametrize(
    "make", [float_weight, lambda weight, _, parts: int8_weight(rounded(weight, 128), None, parts)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_give_the_same_sums(level: Instructions, dtype: torch.dtype, make: Callable[..., Weight]) -> None:
    """Sums by any number of threads, from several callers at once, and after a fork; the last rows are empty.

    Of one part most rows are multiplied three at once, of 200 parts all singly, so that these bits are equal, too.
    """
    weight = make_weight(200, 256, 0.5, dtype)
    weight[150:] = 0
    one, *several = (make(weight, None, parts) for parts in (1, 2, 3, 4, 200))
    for tokens in range(1, min(one.most_rows, 16) + 1):
        inputs = make_weight(tokens, 256, 0, dtype, seed=1)
        assert all(torch.equal(ready.multiply(inputs), one.multiply(inputs)) for ready in several)
    inputs = make_weight(2, 256, 0, dtype, seed=1)
    check_threads_and_fork(lambda: several[1].multiply(inputs), one.multiply(inputs))


@pytest.mark.skipif(native.instructions() < Instructions.AMX, reason="needs a processor with AMX")
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (15, 24), (33, 40), (47, 136), (100, 192)])
def test_products_by_amx_equal_dense_ones(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns and inputs that are no whole tiles; several threads."""
    guard_products(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for sparsity in (0.0, 0.5, 1.0):
        weight = make_weight(rows, columns, sparsity, torch.bfloat16)
        packed = pack_rounded(weight, 64)
        for bias in (None, make_weight(1, rows, 0, torch.bfloat16)[0]):
            sides = [(float_weight(weight, bias), weight)]
            sides += [] if packed is None else [(int8_weight(packed, bias), unpack_rounded(packed))]
            for ready, dense in sides:
                for tokens in (9, 16, 17, 33, 100):
                    inputs = guarded(make_weight(tokens, columns, 0.1, torch.bfloat16, seed=tokens))
                    expected = inputs.double() @ dense.double().T + (0 if bias is None else bias.double())
                    sizes = inputs.double().abs() @ dense.double().abs().T + 1
                    outputs = ready.multiply(inputs).double()
                    assert ((outputs - expected).abs() <= 2e-6 * sizes + 2**-8 * expected.abs()).all()


def test_what_does_not_fit_is_refused(level: Instructions) -> None:
    packed = rounded(make_weight(4, 128, 0.5, torch.float32), 64)
    bits, scales = torch.from_numpy(bitmask(packed.packed)), packed.scales.view(torch.int16)
    parts, kept = Parts.of(bits, (4, 128), 1), len(packed.values)
    right = [packed.values, bits, scales, None, (4, 128), 64, torch.float32, parts]
    for position, wrong in (
        (0, packed.values[1:]), (0, packed.values.float()), (1, bits[1:]), (1, bits.view(torch.int8)), (2, None),
        (2, scales[1:]), (2, scales.float()), (3, torch.ones(3)), (3, torch.ones(4).bfloat16()), (4, (4, 64)),
        (5, 128), (5, 12), (6, torch.float16), (7, Parts.of(bits, (8, 64), 1)),
        (7, Parts((0, 2, 4), (0, kept), parts.block_starts)), (7, Parts((0, 4), (0, kept), np.array([0, 1, kept]))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            Weight(*[wrong if number == position else part for number, part in enumerate(right)])
    weight = Weight(*right)
    for inputs in (
        torch.ones(1, 64),
        torch.ones(1, 128).bfloat16(),
        torch.ones(0, 128),
        torch.empty(1, 128, device="meta"),
    ):
        with pytest.raises(ValueError, match="inputs do not fit"):
            weight.multiply(inputs)
    with pytest.raises(ValueError, match=f"17 input rows: the most is {weight.most_rows}"):
        weight.multiply(torch.ones(17, 128))
    for first, end, into in (
        (0, 4, torch.ones(4, 64)), (0, 4, torch.ones(4, 128).bfloat16()), (0, 4, torch.ones(128, 4).T),
        (0, 8, torch.ones(8, 128)), (1, 4, torch.ones(3, 128)), (0, 3, torch.ones(3, 128)),
        (-16, 4, torch.ones(20, 128)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unpacked"):
            weight.unpack(first, end, into)


@given(rows=st.integers(1, 70), width=st.integers(1, 5), threads=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_parts_have_equal_shares(rows: int, width: int, threads: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kept = generator.random((rows, 8 * width)) < generator.random((rows, 1))
    parts = Parts.of(torch.from_numpy(np.packbits(kept, bitorder="little")), (rows, 8 * width), threads)
    before = [int(kept[:row].sum()) for row in range(rows + 1)]
    assert parts.block_starts.tolist() == [*before[:rows:BLOCK_ROWS], before[rows]]
    assert parts.value_ends == tuple(before[end] for end in parts.row_ends)
    assert (len(parts.row_ends), parts.row_ends[0], parts.row_ends[-1]) == (threads + 1, 0, rows)
    shares = [end - first for first, end in zip(parts.value_ends, parts.value_ends[1:], strict=False)]
    assert max(shares) <= before[rows] / threads + 8 * width + 1  # its share and a row more
