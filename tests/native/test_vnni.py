"""Products with int8 values by VNNI against integer arithmetic in NumPy; arrays that end at a page."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.encoding import bitmask
from llm_barber.checkpoint.rounding import Rounded, pack_rounded, unpack_rounded
from llm_barber.native import Instructions, amx
from llm_barber.native import rounded as native_rounded
from llm_barber.native.rounded import Kernel, Weight, best_kernel, find_kernel
from llm_barber.native.rows import BLOCK_ROWS, Parts
from tests.helpers.guarded import guard_products_by_amx, guarded
from tests.helpers.threads import check_threads_and_fork
from tests.native.test_unrounded import make_weight

pytestmark = pytest.mark.skipif(best_kernel() != Kernel.VNNI, reason="needs a processor with VBMI2 and VNNI")
needs_amx = pytest.mark.skipif(native.instructions() != Instructions.AMX, reason="needs a processor with AMX")
SHAPES = [(1, 8), (3, 24), (7, 64), (5, 136), (33, 200), (12, 1000), (2, 2200), (200, 136), (66, 1096)]


def weight_of(rounded: Rounded, bias: Tensor | None, dtype: torch.dtype, parts: int = 1, place=lambda tensor: tensor):
    """A weight for products, its tensors where `place` puts them."""
    bits = torch.from_numpy(bitmask(rounded.packed))
    tensors = rounded.packed.values, bits, rounded.scales.view(torch.int16)
    shape, columns = rounded.packed.shape, rounded.packed.shape[1]
    placed = [place(tensor).view(tensor.shape) for tensor in tensors]
    bias = None if bias is None else place(bias)
    return Weight(*placed, bias, columns, rounded.group, dtype, Parts.of(bits, shape, parts))


def round_inputs(inputs: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers, int64, (tokens, in), and float32 scales, (tokens, groups), operation by operation."""
    tokens, columns = inputs.shape
    values = inputs.float().numpy()
    whole, scales = np.zeros((tokens, columns), np.int64), np.zeros((tokens, -(-columns // group)), np.float32)
    for token in range(tokens):
        for start in range(0, columns, group):
            part = values[token, start : start + group]
            largest = np.abs(part).max()
            if largest > 0:
                scales[token, start // group] = largest / np.float32(127)
                whole[token, start : start + group] = np.rint(part * (np.float32(127) / largest))
    return whole, scales


def dense_values(rounded: Rounded) -> np.ndarray:
    rows, columns = rounded.packed.shape
    dense = np.zeros(rows * columns, np.int64)
    kept = np.unpackbits(bitmask(rounded.packed), count=rows * columns, bitorder="little").astype(bool)
    dense[kept] = rounded.packed.values.numpy()
    return dense.reshape(rows, columns)


def pack(weight: Tensor, group: int) -> Rounded:
    rounded = pack_rounded(weight, group)
    assert rounded is not None
    return rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("group", [64, 128, 1024])
def test_sums_are_those_of_integers(dtype: torch.dtype, sparsity: float, rows: int, columns: int, group: int) -> None:
    rounded = pack(make_weight(rows, columns, sparsity, dtype), group)
    values, weight_scales = dense_values(rounded), rounded.scales.double().numpy()
    for tokens in (1, 2, 4, 5, 8):
        inputs = make_weight(tokens, columns, 0.1, dtype, seed=tokens)
        whole, scales = round_inputs(inputs, group)
        expected = np.zeros((tokens, rows))
        sizes = np.ones((tokens, rows))
        for number, start in enumerate(range(0, columns, group)):
            part = slice(start, start + group)
            factors = scales[:, number : number + 1].astype(float) * weight_scales[None, :, number]
            expected += whole[:, part] @ values[:, part].T * factors
            sizes += np.abs(whole[:, part]) @ np.abs(values[:, part]).T * factors
        for bias in (None, make_weight(1, rows, 0, dtype)[0]):
            outputs = weight_of(rounded, bias, dtype, 1 + rows % 3).multiply(inputs).double().numpy()
            target = expected + (0 if bias is None else bias.double().numpy())
            rounding = 2**-8 * np.abs(target) if dtype == torch.bfloat16 else 0
            assert (np.abs(outputs - target) <= 2e-6 * sizes + rounding).all()


@needs_amx
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (32, 40), (33, 72), (47, 136), (100, 64)])
@pytest.mark.parametrize("group", [64, 128, 1024])
def test_many_rows_of_inputs_are_not_rounded(
    sparsity: float, rows: int, columns: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AMX: products with the unpacked weight. Several threads; every array ends where a page does."""
    guard_products_by_amx(monkeypatch)
    rounded = pack(make_weight(rows, columns, sparsity, torch.bfloat16), group)
    restored = unpack_rounded(rounded).double()
    for bias in (None, make_weight(1, rows, 0, torch.bfloat16)[0]):
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            ready = weight_of(rounded, bias, torch.bfloat16, threads, place=guarded)
            for tokens in (9, 16, 33, 100):
                inputs = guarded(make_weight(tokens, columns, 0.1, torch.bfloat16, seed=tokens))
                expected = inputs.double() @ restored.T + (0 if bias is None else bias.double())
                sizes = inputs.double().abs() @ restored.abs().T + 1
                outputs = ready.multiply(inputs).double()
                assert ((outputs - expected).abs() <= 2e-6 * sizes + 2**-8 * expected.abs()).all()


@needs_amx
def test_without_amx_there_are_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = pack(make_weight(4, 128, 0.5, torch.bfloat16), 64)
    assert weight_of(rounded, None, torch.bfloat16).most_rows > 1000
    older = SimpleNamespace(**{**vars(amx._functions()), "multiply_rounded": None})
    monkeypatch.setattr(amx, "_functions", lambda: older)  # of an extension that was built earlier
    assert weight_of(rounded, None, torch.bfloat16).most_rows == 8
    monkeypatch.undo()
    monkeypatch.setattr(native, "instructions", lambda: Instructions.AVX512BF16)
    assert weight_of(rounded, None, torch.bfloat16).most_rows == 8


@pytest.mark.parametrize("group", [2**64, 2**64 + 64, 2**63])
def test_a_group_of_any_size_is_a_row(group: int) -> None:
    """A file that lies: C has 64 bits for the columns of a scale."""
    rounded = pack(make_weight(40, 200, 0.5, torch.bfloat16), 256)
    hostile = Rounded(rounded.packed, rounded.scales, group, torch.bfloat16)
    for tokens in (1, 20)[: 1 + (native.instructions() == Instructions.AMX)]:
        inputs = make_weight(tokens, 200, 0, torch.bfloat16)
        right, other = (weight_of(each, None, torch.bfloat16) for each in (rounded, hostile))
        assert torch.equal(other.multiply(inputs), right.multiply(inputs))
    into = torch.empty(40, 200, dtype=torch.bfloat16)
    other.unpack(0, 40, into)
    assert torch.equal(into, unpack_rounded(rounded))


@needs_amx
def test_the_largest_weights_stay_finite() -> None:
    """A scale that lies: value times scale is cut at the largest number, as it is when the weight is unpacked."""
    rounded = pack(make_weight(5, 128, 0.5, torch.bfloat16), 64)
    scales = torch.full_like(rounded.scales, torch.finfo(torch.bfloat16).max)
    hostile = Rounded(rounded.packed, scales, 64, torch.bfloat16)
    inputs = torch.full((9, 128), 2.0**-20).bfloat16()
    inputs[:, 1:] = 0
    outputs = weight_of(hostile, None, torch.bfloat16).multiply(inputs)
    assert torch.equal(outputs, inputs @ unpack_rounded(hostile).T)


def test_integer_sums_are_exact() -> None:
    """Scales of 1: outputs are the sums, and equal integers; the largest sums of all are among them."""
    generator = np.random.default_rng(0)
    values = generator.integers(-127, 128, (9, 256))
    values[:, ::2] = 0
    values[:, 1] = values[:, 129] = 127  # the largest of each group, so that the scale is 1
    values[0, 1::2], values[1, 1::2] = 127, -127
    values[1, 1] = values[1, 129] = -127
    whole = generator.integers(-127, 128, (5, 256))
    whole[:, 0] = whole[:, 128] = 127
    whole[0], whole[1] = 127, -127
    rounded = pack(torch.from_numpy(values).float(), 128)
    assert rounded.scales.unique().tolist() == [1]
    outputs = weight_of(rounded, None, torch.float32).multiply(torch.from_numpy(whole).float())
    assert np.array_equal(outputs.numpy().astype(np.int64), whole @ values.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (70, 128)])
@pytest.mark.parametrize("level", [Instructions.AVX512, Instructions.AVX512BF16])
def test_weights_are_unpacked_bit_for_bit(
    dtype: torch.dtype, rows: int, columns: int, level: Instructions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of all sizes, with AVX-512 BF16 and without it; rows in any blocks, on three threads."""
    if level > native.instructions():
        pytest.skip(f"needs {level.name}")
    monkeypatch.setattr(native, "instructions", lambda: level)
    for size in (1.0, 1e-38, 2.0**-90, 2.0**102, 1e38):
        weight = (make_weight(rows, columns, 0.5, torch.float32) * size).clamp(-3e38, 3e38).to(dtype)
        rounded = pack(weight, 64)
        for scales in (rounded.scales, torch.full_like(rounded.scales, torch.finfo(torch.bfloat16).max)):
            hostile = Rounded(rounded.packed, scales, 64, dtype)
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
def test_nothing_is_read_behind_an_array(dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read beyond an array ends the process: every array ends where a page does."""
    empty = torch.empty
    monkeypatch.setattr(native_rounded.torch, "empty", lambda *shape, **kind: guarded(empty(*shape, **kind)))
    for sparsity in (0.2, 0.5, 0.95, 1.0):
        for rows in (1, 5, 48, 52):  # the last two: of which several are multiplied at once
            rounded = pack(make_weight(rows, columns, sparsity, dtype), 64)
            restored = unpack_rounded(rounded)
            weight = weight_of(rounded, restored[:, 0].contiguous(), dtype, place=guarded)
            for tokens in (1, 3, 20)[: 2 + (weight.most_rows > 8)]:
                inputs = guarded(make_weight(tokens, columns, 0, dtype, seed=1))
                outputs = weight.multiply(inputs)
                expected = inputs.double() @ restored.double().T + restored[:, 0].double()
                torch.testing.assert_close(outputs.double(), expected, rtol=3e-2, atol=0.3)
            into = guarded(torch.empty(rows, columns, dtype=dtype))
            weight.unpack(0, rows, into)
            assert torch.equal(into, restored)


def test_a_mask_with_more_bits_than_values_reads_nothing_behind_them() -> None:
    """A file whose mask lies: the weights without a value are zero."""
    values, bits = guarded(torch.ones(40, dtype=torch.int8)), torch.full((32,), 255, dtype=torch.uint8)
    scales = torch.ones(4, 1).bfloat16().view(torch.int16)
    parts = Parts((0, 4), (0, 40), np.array([0, 40]))
    weight = Weight(values, bits, scales, None, 64, 64, torch.float32, parts)
    assert weight.multiply(torch.ones(1, 64)).round().tolist() == [[40, 0, 0, 0]]
    rows = 64  # of which several are multiplied at once
    bits, scales = torch.full((rows * 8,), 255, dtype=torch.uint8), torch.ones(rows, 1).bfloat16().view(torch.int16)
    parts = Parts((0, rows), (0, 40), np.array([0, 40, 40, 40, 40]))
    weight = Weight(values, bits, scales, None, 64, 64, torch.float32, parts)
    for tokens in (1, 3, 8):
        assert weight.multiply(torch.ones(tokens, 64)).round().tolist() == [[40] + [0] * (rows - 1)] * tokens
    values, bits = guarded(torch.ones(100, dtype=torch.int8)), torch.full((64,), 255, dtype=torch.uint8)
    scales = torch.ones(4, 2).bfloat16().view(torch.int16)
    parts = Parts((0, 4), (0, 100), np.array([0, 100]))
    weight = Weight(values, bits, scales, None, 128, 64, torch.bfloat16, parts)
    for tokens in (1, 16)[: 1 + (weight.most_rows > 8)]:  # the second by AMX
        outputs = weight.multiply(torch.ones(tokens, 128, dtype=torch.bfloat16))
        assert outputs.round().tolist() == [[100, 0, 0, 0]] * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_that_have_no_scale(dtype: torch.dtype) -> None:
    rounded = pack(make_weight(6, 128, 0.5, dtype), 64)
    weight = weight_of(rounded, None, dtype)
    inputs = torch.zeros(4, 128, dtype=dtype)
    inputs[1] = 1e-36
    inputs[2, 3], inputs[3, 100] = float("inf"), float("nan")
    outputs = weight.multiply(inputs)
    assert not outputs[:2].any()
    assert outputs[2:].isnan().all()


@pytest.mark.parametrize(
    ("tokens", "dtype"), [*((tokens, torch.float32) for tokens in (1, 2, 3, 4, 8)), (20, torch.bfloat16)]
)
def test_threads_give_the_same_sums(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by any number of threads, from several callers at once, and after a fork."""
    if tokens > 8 and native.instructions() < Instructions.AMX:
        pytest.skip("needs a processor with AMX")
    monkeypatch.setattr("llm_barber.native.threads.VALUES_A_THREAD", 16)
    weight = make_weight(200, 256, 0.5, dtype)
    weight[150:] = 0
    rounded, inputs = pack(weight, 128), make_weight(tokens, 256, 0, dtype, seed=1)
    alone = weight_of(rounded, None, dtype).multiply(inputs)
    for parts in (2, 4, 200, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda parts=parts: parts)
        ready = weight_of(rounded, None, dtype, parts)
        assert torch.equal(ready.multiply(inputs), alone)
    check_threads_and_fork(lambda: ready.multiply(inputs), alone)


def test_what_does_not_fit_is_refused() -> None:
    rounded = pack(make_weight(4, 128, 0.5, torch.float32), 64)
    bits, scales = torch.from_numpy(bitmask(rounded.packed)), rounded.scales.view(torch.int16)
    values, parts = rounded.packed.values, Parts.of(bits, (4, 128), 1)
    right = [values, bits, scales, None, 128, 64, torch.float32, parts]
    Weight(*right)
    for position, wrong in (
        (0, values[1:]), (0, values.view(torch.uint8)), (1, bits[1:]), (1, bits.view(torch.int8)), (2, scales[1:]),
        (2, scales.float()), (3, torch.ones(3)), (3, torch.ones(4).bfloat16()), (4, 64), (5, 128), (5, 32),
        (6, torch.float16), (7, Parts.of(bits, (8, 64), 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="product"):
            Weight(*[wrong if number == position else part for number, part in enumerate(right)])
    weight = Weight(*right)
    for inputs in (torch.ones(1, 64), torch.ones(9, 128), torch.ones(1, 128).bfloat16(), torch.ones(0, 128)):
        with pytest.raises(ValueError, match="inputs do not fit"):
            weight.multiply(inputs)
    for first, end, into in (
        (0, 4, torch.ones(4, 64)), (0, 4, torch.ones(4, 128).bfloat16()), (0, 4, torch.ones(128, 4).T),
        (0, 8, torch.ones(8, 128)), (1, 4, torch.ones(3, 128)), (0, 3, torch.ones(3, 128)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unpacked"):
            weight.unpack(first, end, into)


def test_instructions_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instructions", lambda: Instructions.AVX2)
    assert find_kernel(64, 64) == Kernel.AVX2
    monkeypatch.setattr(native, "instructions", lambda: Instructions.AVX512)
    assert find_kernel(64, 64) == Kernel.VNNI
    assert find_kernel(128, 96) == Kernel.AVX2
    assert find_kernel(60, 64) == Kernel.NUMPY
