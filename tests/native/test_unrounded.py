"""Products by AVX-512 against dense ones: rounding, threads, forced instructions, and arrays that end at a page."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.encoding import pack
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions, unrounded
from llm_barber.native.rows import BLOCK_ROWS, Parts
from llm_barber.runtime import packed_linear
from llm_barber.runtime.packed_linear import PackedLinear
from tests.helpers.guarded import guard_outputs, guard_products_by_amx, guarded
from tests.helpers.threads import check_threads_and_fork

LEVEL = native.instructions()
needs_c = pytest.mark.skipif(
    native.library() is None, reason="src/llm_barber/native is not built here: pip install -e ."
)


@pytest.fixture(params=Instructions, ids=lambda level: level.name)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Instructions:
    if request.param > LEVEL:
        pytest.skip(f"needs {request.param.name}")
    monkeypatch.setattr(native, "instructions", lambda: request.param)
    return Instructions(request.param)


def most_tokens(level: Instructions) -> int:
    """Most rows of inputs of a product."""
    return unrounded.AVX2_ROWS if level == Instructions.AVX2 else unrounded.ROWS


def make_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)


def parts_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and bit mask."""
    kept = weight != 0
    return weight[kept], torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))


def make_parts(weight: Tensor, parts: int) -> Parts:
    """Parts of about as many rows; brute force."""
    ends = [len(weight) * number // parts for number in range(parts + 1)]
    before = [int((weight[:row] != 0).sum()) for row in range(len(weight) + 1)]
    blocks = [*before[:-1:BLOCK_ROWS], before[-1]]
    return Parts(tuple(ends), tuple(before[end] for end in ends), np.array(blocks))


def multiply(weight: Tensor, inputs: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    shape = weight.shape[0], weight.shape[1]
    return unrounded.Weight(*parts_of(weight), bias, shape, make_parts(weight, parts), parts).multiply(inputs)


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 24), (7, 40), (33, 96), (12, 1000), (5, 136), (200, 72)])
@pytest.mark.parametrize("parts", [1, 3])
def test_products_equal_dense_ones(
    level: Instructions, dtype: torch.dtype, sparsity: float, rows: int, columns: int, parts: int
) -> None:
    weight = make_weight(rows, columns, sparsity, dtype)
    for tokens in (1, 2, 3, 5, 8, 9, 16) if level > Instructions.AVX2 else (1, 2, 3, 4):
        inputs = make_weight(tokens, columns, 0.1, dtype, seed=tokens)
        for bias in (None, make_weight(1, rows, 0, dtype)[0]):
            outputs = multiply(weight, inputs, bias, parts)
            expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
            # The sum of float32 products, and the one rounding of the output.
            sizes = inputs.double().abs() @ weight.double().abs().T + 1
            rounding = 2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
            assert ((outputs.double() - expected).abs() <= 2e-6 * sizes + rounding).all()
            assert outputs.dtype == dtype


@needs_c
def test_bfloat16_outputs_are_rounded_to_nearest_even(level: Instructions) -> None:
    """Sums of 256 and small numbers, of which bfloat16 keeps eight bits; infinities and NaN stay so."""
    inputs = torch.tensor([[256, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bfloat16)
    weight = torch.tensor(
        [[1, value, 0, 0, 0, 0, 0, 0] for value in (1, 1.5, 3, 2, -1, float("inf"), float("nan"))], dtype=torch.bfloat16
    )
    expected = (inputs.float() @ weight.float().T).bfloat16()
    outputs = multiply(weight, inputs, None, 1)
    assert outputs[0, :6].tolist() == expected[0, :6].tolist() == [256, 258, 260, 258, 255, float("inf")]
    assert outputs[0, 6].isnan()


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 40, 64, 152])
def test_nothing_is_read_behind_an_array(
    level: Instructions, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read beyond an array ends the process: every array ends where a page does."""
    guard_outputs(monkeypatch)
    for sparsity in (0.0, 0.5, 0.95, 1.0):
        for rows in (1, 5, 48, 52):  # the last two: of which three are multiplied at once
            weight = make_weight(rows, columns, sparsity, dtype)
            values, bits = map(guarded, parts_of(weight))
            bias = guarded(weight[:, 0].contiguous())
            ready = unrounded.Weight(values, bits, bias, (rows, columns), make_parts(weight, 1), 1)
            for tokens in range(1, most_tokens(level) + 1):
                inputs = guarded(make_weight(tokens, columns, 0, dtype, seed=1))
                expected = inputs.double() @ weight.double().T + bias.double()
                torch.testing.assert_close(ready.multiply(inputs).double(), expected, rtol=1e-2, atol=1e-2)


@needs_c
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [8, 16, 24, 32, 40, 56, 64, 160])
def test_unpacking_stays_within_its_arrays(kind: type[np.unsignedinteger], count: int) -> None:
    generator = np.random.default_rng(count)
    for density in (0.0, 0.3, 0.5, 1.0):
        kept = generator.random(count) < density
        values = generator.integers(1, 2**16, kept.sum()).astype(kind)
        bits = np.packbits(kept, bitorder="little")
        arrays = [
            guarded(torch.from_numpy(array.view(np.uint8))).numpy() for array in (values, bits, np.zeros(count, kind))
        ]
        native.put(arrays[0].view(kind), arrays[1], arrays[2].view(kind))
        expected = np.zeros(count, kind)
        expected[kept] = values
        assert np.array_equal(arrays[2].view(kind), expected)


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_with_more_bits_than_values_reads_nothing_behind_them(level: Instructions, dtype: torch.dtype) -> None:
    """A file whose mask lies: the weights without a value are zero."""
    values, bits = guarded(torch.ones(40, dtype=dtype)), torch.full((32,), 255, dtype=torch.uint8)
    ready = unrounded.Weight(values, bits, None, (4, 64), Parts((0, 4), (0, 40), np.array([0, 40])), 1)
    assert ready.multiply(torch.ones(1, 64, dtype=dtype)).tolist() == [[40, 0, 0, 0]]
    unpacked = torch.ones(4, 64, dtype=dtype)
    ready.unpack(0, 4, unpacked)
    assert unpacked.flatten().tolist() == [1] * 40 + [0] * 216


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_at_once_read_no_values_that_a_mask_makes_up(level: Instructions, dtype: torch.dtype) -> None:
    """A file whose mask lies, in a weight of which three rows are multiplied at once.

    All bits are set. Where 80 values are left, the first rows at once, 0, 16 and 32, still find 64 each; the next ones,
    multiplied singly, find 16, 8 and none.
    """
    if level == Instructions.AVX2:
        pytest.skip("multiplies one row after another")
    rows, bits = 64, guarded(torch.full((512,), 255, dtype=torch.uint8))
    for kept, starts, expected in (
        (40, [0, 40, 40, 40, 40], {0: 40}),
        (80, [0, 8, 16, 24, 80], {0: 64, 1: 16, 16: 64, 17: 8, 32: 64}),
    ):
        values, parts = guarded(torch.ones(kept, dtype=dtype)), Parts((0, rows), (0, kept), np.array(starts))
        ready = unrounded.Weight(values, bits, None, (rows, 64), parts, 1)
        most = min(most_tokens(level), ready.fast_rows, ready._amx_rows - 1)  # AMX goes along two blocks of rows
        for tokens in range(1, most + 1):
            outputs = ready.multiply(torch.ones(tokens, 64, dtype=dtype))
            assert outputs.tolist() == [[expected.get(row, 0) for row in range(rows)]] * tokens


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_give_the_same_sums(level: Instructions, dtype: torch.dtype) -> None:
    """Sums by any number of threads, from several callers at once, and after a fork.

    Of one part most rows are multiplied three at once, until few values are left, since the last rows have none. Of two
    parts as well, and the second begins within a block. Of 200 parts all rows are multiplied singly.
    """
    weight = make_weight(200, 256, 0.5, dtype)
    weight[150:] = 0
    values, bits = parts_of(weight)
    one, *several = (
        unrounded.Weight(values, bits, None, (200, 256), make_parts(weight, parts), parts)
        for parts in (1, 2, 3, 4, 200)
    )
    for tokens in range(1, most_tokens(level) + 1):
        inputs = make_weight(tokens, 256, 0, dtype, seed=1)
        assert all(torch.equal(ready.multiply(inputs), one.multiply(inputs)) for ready in several)
    inputs = make_weight(2, 256, 0, dtype, seed=1)
    alone = one.multiply(inputs)
    check_threads_and_fork(lambda: several[1].multiply(inputs), alone)


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 24), (40, 32), (47, 136)])
def test_rows_are_unpacked_on_any_number_of_threads(
    level: Instructions, dtype: torch.dtype, rows: int, columns: int
) -> None:
    for sparsity in (0.0, 0.5, 1.0):
        weight = make_weight(rows, columns, sparsity, dtype)
        for parts in (1, 2, 3, 7):
            ready = unrounded.Weight(*parts_of(weight), None, (rows, columns), make_parts(weight, min(parts, rows)), 1)
            for first in range(0, rows, BLOCK_ROWS):
                for end in {*range(first, rows, BLOCK_ROWS), rows}:
                    into = guarded(torch.ones((end - first) * columns, dtype=dtype))
                    ready.unpack(first, end, into)
                    assert torch.equal(into.view(-1, columns), weight[first:end])


@needs_c
def test_what_does_not_fit_is_refused(level: Instructions) -> None:
    weight, inputs = make_weight(4, 16, 0.5, torch.float32), torch.ones(1, 16)
    values, bits = parts_of(weight)
    parts, shape = make_parts(weight, 1), (4, 16)
    kept = len(values)
    for arguments in (
        (values.half(), bits, None, shape, parts),
        (values[1:], bits, None, shape, parts),
        (values, bits[1:], None, shape, parts),
        (values, bits.char(), None, shape, parts),
        (values, bits, torch.ones(3), shape, parts),
        (values, bits, torch.ones(4).bfloat16(), shape, parts),
        (values, bits, None, (4, 15), parts),
        (values, bits, None, (8, 8), parts),
        (values, bits, None, shape, Parts((0, 2, 4), (0, kept), parts.block_starts)),
        (values, bits, None, shape, Parts((0, 4), (0, kept + 1), parts.block_starts)),
        (values, bits, None, shape, Parts((0, 4), (0, kept), np.array([0, 1, kept]))),
        (values, bits, None, shape, Parts((0, 4), (0, kept), np.array([0, kept + 1]))),
    ):
        with pytest.raises(ValueError, match="product"):
            unrounded.Weight(*arguments, 1)
    ready = unrounded.Weight(values, bits, None, shape, parts, 1)
    for wrong in (torch.ones(1, 24), torch.ones(2, 8), torch.ones(0, 16), inputs.bfloat16()):
        with pytest.raises(ValueError, match="product"):
            ready.multiply(wrong)
    with pytest.raises(ValueError, match=f"17 input rows: the most is {most_tokens(level)}"):
        ready.multiply(torch.ones(17, 16))
    with pytest.raises(ValueError, match="product"):
        ready.multiply(torch.empty(1, 16, device="meta"))
    for first, end, into in (
        (0, 4, torch.empty(63)), (0, 8, torch.empty(128)), (1, 4, torch.empty(48)), (-16, 4, torch.empty(320)),
        (0, 3, torch.empty(48)), (0, 4, torch.empty(16, 4).T), (0, 4, torch.empty(64).bfloat16()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="unpacked"):
            ready.unpack(first, end, into)


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_which_rows_are_multiplied_packed(
    level: Instructions, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows by AVX-512 or AVX2, many unpacked; with AMX any number of bfloat16 rows."""
    narrow = dtype == torch.bfloat16
    packed = pack(make_weight(16, 64, 0.5, dtype))
    assert packed is not None
    linear = PackedLinear(packed, None)
    monkeypatch.setattr(unrounded.Weight, "multiply", lambda weight, inputs: inputs)
    monkeypatch.setattr(packed_linear, "multiply_unpacked", lambda weight, inputs, bias: None)
    most = unrounded.AVX2_ROWS if level == Instructions.AVX2 else unrounded.ROWS
    if narrow and level in (Instructions.AVX512, Instructions.AMX):
        most = unrounded.WIDENED_ROWS if level == Instructions.AVX512 else 1000
    for rows in (1, 4, 5, 8, 9, 16, 17, 1000):
        packed_product = linear(torch.ones(rows, 64, dtype=dtype)) is not None
        assert packed_product == (rows <= most)


def amx_or_skip() -> None:
    if LEVEL < Instructions.AMX:
        pytest.skip("needs a processor with AMX")


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (15, 24), (16, 32), (33, 40), (47, 136), (100, 64)])
def test_products_by_amx_equal_dense_ones(
    sparsity: float, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns and inputs that are no whole tiles; several threads; every array ends where a page does."""
    amx_or_skip()
    guard_products_by_amx(monkeypatch)
    weight = make_weight(rows, columns, sparsity, torch.bfloat16)
    values, bits = map(guarded, parts_of(weight))
    for bias in (None, guarded(make_weight(1, rows, 0, torch.bfloat16)[0])):
        for threads in (1, 3):
            ready = unrounded.Weight(values, bits, bias, (rows, columns), make_parts(weight, 1), threads)
            for tokens in (4, 15, 16, 17, 33, 64, 100):
                inputs = guarded(make_weight(tokens, columns, 0.1, torch.bfloat16, seed=tokens))
                expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
                sizes = inputs.double().abs() @ weight.double().abs().T + 1
                outputs = ready.multiply(inputs)
                assert ((outputs.double() - expected).abs() <= 2e-6 * sizes + 2**-8 * expected.abs()).all()


def test_amx_rounds_to_nearest_even_and_trusts_no_mask() -> None:
    amx_or_skip()
    inputs = torch.tensor([[256, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bfloat16).expand(20, 8)
    weight = torch.tensor(
        [[1, value, 0, 0, 0, 0, 0, 0] for value in (1, 1.5, 3, 2, -1, float("inf"), float("nan"))], dtype=torch.bfloat16
    )
    outputs = multiply(weight, inputs, None, 1)
    assert outputs[:, :6].tolist() == [[256, 258, 260, 258, 255, float("inf")]] * 20
    assert outputs[:, 6].isnan().all()
    values, bits = guarded(torch.ones(40, dtype=torch.bfloat16)), torch.full((32,), 255, dtype=torch.uint8)
    ready = unrounded.Weight(values, bits, None, (4, 64), Parts((0, 4), (0, 40), np.array([0, 40])), 1)
    assert ready.multiply(torch.ones(16, 64).bfloat16()).tolist() == [[40, 0, 0, 0]] * 16


@needs_c
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_takes_inputs_of_any_shape(level: Instructions, dtype: torch.dtype) -> None:
    weight, bias = make_weight(17, 40, 0.5, dtype), make_weight(1, 34, 0, dtype)[0]
    packed = pack(weight)
    assert packed is not None
    for given in (None, bias[:17], bias[::2]):  # the last one has gaps
        linear = PackedLinear(packed, None if given is None else torch.nn.Parameter(given, requires_grad=False))
        for shape in ((40,), (1, 40), (2, 2, 40), (1, 3, 40), (0, 40), (3, 11, 40)):
            inputs = torch.randn(shape).to(dtype)
            expected = torch.nn.functional.linear(inputs, weight, given)
            torch.testing.assert_close(linear(inputs), expected, rtol=1e-2, atol=2e-2)


@needs_c
def test_inputs_may_have_gaps(level: Instructions) -> None:
    weight, inputs = make_weight(5, 16, 0.5, torch.float32), make_weight(16, 3, 0, torch.float32, seed=1).T
    torch.testing.assert_close(multiply(weight, inputs, None, 1), inputs @ weight.T)


@pytest.mark.parametrize(("forced", "name"), [("avx2", "AVX2"), ("avx512", "AVX512"), ("", LEVEL.name)])
def test_instructions_can_be_forced(forced: str, name: str) -> None:
    code = "from llm_barber.native import instructions; print(instructions().name)"
    environment = os.environ | {native.ISA: forced}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert process.stdout.strip() == min(LEVEL, Instructions[name]).name


@pytest.mark.parametrize(
    ("built", "most", "forced", "text"),
    [
        (False, Instructions.AVX2, "", "unpacked by NumPy, since the C extension is missing"),
        (True, Instructions.AVX2, "", "AVX2, since the processor lacks AVX-512"),
        (True, Instructions.AMX, "avx512", "AVX512; the processor has AMX"),
    ],
)
def test_the_log_says_what_is_used(
    built: bool, most: Instructions, forced: str, text: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv(native.ISA, forced)
    monkeypatch.setattr(native, "library", lambda: object() if built else None)
    monkeypatch.setattr(native, "processor_instructions", lambda: most)
    with caplog.at_level(logging.INFO, logger="llm_barber"):
        native.instructions.__wrapped__()
    assert text in caplog.text


def test_other_names_of_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA, "sse2")
    with pytest.raises(SettingsError, match="LLM_BARBER_ISA=sse2"):
        native.instructions.__wrapped__()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_c
def test_threads_of_a_linear_share_its_values(three_threads: None) -> None:
    """The first rows are full: each thread has about a third of the values."""
    weight = make_weight(2000, 512, 0.9, torch.bfloat16)
    weight[:200] = 1
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, None)
    parts = linear._divided(3)
    values = [end - first for first, end in zip(parts.value_ends, parts.value_ends[1:], strict=False)]
    assert sum(values) == len(linear.values)
    assert len(values) == 3
    assert max(values) - min(values) < 2 * 512
    inputs = make_weight(1, 512, 0, torch.bfloat16, seed=1)
    torch.testing.assert_close(linear(inputs), torch.nn.functional.linear(inputs, weight), rtol=1e-2, atol=0.1)
