"""Products by AVX-512 against dense ones: rounding, threads, forced instructions, and arrays that end at a page."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.encoding import pack
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions, avx512
from llm_barber.runtime.packed_linear import PackedLinear

LEVEL = native.instructions()
needs_avx512 = pytest.mark.skipif(LEVEL == 0, reason="needs a processor with AVX-512 and VBMI2")


@pytest.fixture(params=[Instructions.AVX512, Instructions.AVX512BF16], ids=lambda level: level.name)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Instructions:
    if request.param > LEVEL:
        pytest.skip(f"needs {request.param.name}")
    monkeypatch.setattr(native, "instructions", lambda: request.param)
    return Instructions(request.param)


def make_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0).to(dtype)


def parts_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and bit mask."""
    kept = weight != 0
    return weight[kept], torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))


def multiply(weight: Tensor, inputs: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    values, bits = parts_of(weight)
    ends = [len(weight) * number // parts for number in range(parts + 1)]
    starts = [int((weight[:end] != 0).sum()) for end in ends]
    return avx512.multiply(values, bits, inputs, bias, ends, starts)


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 24), (7, 40), (33, 96), (12, 1000), (5, 136)])
@pytest.mark.parametrize("parts", [1, 3])
def test_products_equal_dense_ones(
    level: Instructions, dtype: torch.dtype, sparsity: float, rows: int, columns: int, parts: int
) -> None:
    weight = make_weight(rows, columns, sparsity, dtype)
    for tokens in (1, 2, 3, 5, 8, 16):
        inputs = make_weight(tokens, columns, 0.1, dtype, seed=tokens)
        for bias in (None, make_weight(1, rows, 0, dtype)[0]):
            outputs = multiply(weight, inputs, bias, parts)
            expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
            # The sum of float32 products, and the one rounding of the output.
            sizes = inputs.double().abs() @ weight.double().abs().T + 1
            rounding = 2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
            assert ((outputs.double() - expected).abs() <= 2e-6 * sizes + rounding).all()
            assert outputs.dtype == dtype


@needs_avx512
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


class Guarded:
    """Memory whose end is the end of a page, behind which a page cannot be read or written."""

    def __init__(self, tensor: Tensor) -> None:
        size = max(tensor.numel() * tensor.element_size(), 1)
        pages = -(-size // mmap.PAGESIZE)
        self.map = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        protected = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
        assert libc.mprotect(protected, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        offset = pages * mmap.PAGESIZE - tensor.numel() * tensor.element_size()
        self.tensor = (
            torch.frombuffer(self.map, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            if (tensor.numel())
            else tensor
        )
        self.tensor.copy_(tensor.flatten())


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 40, 64, 152])
def test_nothing_is_read_behind_an_array(
    level: Instructions, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read beyond an array ends the process: every array ends where a page does."""
    memory = []

    def guarded(tensor: Tensor) -> Tensor:
        memory.append(Guarded(tensor))
        return memory[-1].tensor.view(tensor.shape)

    empty = torch.empty
    monkeypatch.setattr(avx512.torch, "empty", lambda *shape, **kind: guarded(empty(*shape, **kind)))
    for sparsity in (0.0, 0.5, 0.95, 1.0):
        for rows in (1, 5):
            weight = make_weight(rows, columns, sparsity, dtype)
            values, bits = map(guarded, parts_of(weight))
            inputs, bias = guarded(make_weight(3, columns, 0, dtype, seed=1)), guarded(weight[:, 0].contiguous())
            outputs = avx512.multiply(values, bits, inputs, bias, [0, rows], [0, len(values)])
            expected = inputs.double() @ weight.double().T + bias.double()
            torch.testing.assert_close(outputs.double(), expected, rtol=1e-2, atol=1e-2)


@needs_avx512
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [8, 16, 24, 32, 40, 56, 64, 160])
def test_unpacking_stays_within_its_arrays(kind: type[np.unsignedinteger], count: int) -> None:
    generator = np.random.default_rng(count)
    for density in (0.0, 0.3, 0.5, 1.0):
        kept = generator.random(count) < density
        values = generator.integers(1, 2**16, kept.sum()).astype(kind)
        bits = np.packbits(kept, bitorder="little")
        memory = [Guarded(torch.from_numpy(array.view(np.uint8))) for array in (values, bits, np.zeros(count, kind))]
        arrays = [guarded.tensor.numpy() for guarded in memory]
        native.put(arrays[0].view(kind), arrays[1], arrays[2].view(kind))
        expected = np.zeros(count, kind)
        expected[kept] = values
        assert np.array_equal(arrays[2].view(kind), expected)


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_with_more_bits_than_values_reads_nothing_behind_them(level: Instructions, dtype: torch.dtype) -> None:
    """A file whose mask lies: the weights without a value are zero."""
    values, bits, inputs = Guarded(torch.ones(40, dtype=dtype)), torch.full((32,), 255, dtype=torch.uint8), 64
    outputs = avx512.multiply(values.tensor, bits, torch.ones(1, inputs, dtype=dtype), None, [0, 4], [0, 40])
    assert outputs.tolist() == [[40, 0, 0, 0]]


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_give_the_same_sums(dtype: torch.dtype) -> None:
    """Sums by any number of threads, from several callers at once, and after a fork."""
    weight, inputs = make_weight(61, 256, 0.5, dtype), make_weight(2, 256, 0, dtype, seed=1)
    alone = multiply(weight, inputs, None, 1)
    assert all(torch.equal(multiply(weight, inputs, None, parts), alone) for parts in (2, 3, 4, 61))
    results: list[bool] = []

    def call() -> None:
        results.append(all(torch.equal(multiply(weight, inputs, None, 3), alone) for _ in range(50)))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 3
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(multiply(weight, inputs, None, 3), alone) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_avx512
def test_what_does_not_fit_is_refused() -> None:
    weight, inputs = make_weight(4, 16, 0.5, torch.float32), torch.ones(1, 16)
    values, bits = parts_of(weight)
    starts = [0, len(values)]
    for arguments in (
        (values, bits, torch.ones(1, 24), None, [0, 4], starts),
        (values, bits, torch.ones(17, 16), None, [0, 4], starts),
        (values, bits, torch.ones(16, 2).T, None, [0, 4], starts),
        (values, bits, inputs.bfloat16(), None, [0, 4], starts),
        (values[1:], bits, inputs, None, [0, 4], starts),
        (values, bits[1:], inputs, None, [0, 4], starts),
        (values, bits, inputs, torch.ones(3), [0, 4], starts),
        (values, bits, inputs, None, [0, 2, 4], starts),
    ):
        with pytest.raises(ValueError, match="product"):
            avx512.multiply(*arguments)


@pytest.mark.parametrize(("forced", "name"), [("avx2", "AVX2"), ("avx512", "AVX512"), ("", LEVEL.name)])
def test_instructions_can_be_forced(forced: str, name: str) -> None:
    code = "from llm_barber.native import instructions; print(instructions().name)"
    environment = os.environ | {native.ISA: forced}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert process.stdout.strip() == min(LEVEL, Instructions[name]).name


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


@needs_avx512
def test_threads_of_a_linear_share_its_values(three_threads: None) -> None:
    """The first rows are full: each thread has about a third of the values."""
    weight = make_weight(2000, 512, 0.9, torch.bfloat16)
    weight[:200] = 1
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, None)
    parts = linear._thread_parts(3)
    values = [last - first for _, _, first, last in parts]
    assert sum(values) == len(linear.values)
    assert max(values) - min(values) < 2 * 512
    inputs = make_weight(1, 512, 0, torch.bfloat16, seed=1)
    torch.testing.assert_close(linear(inputs), torch.nn.functional.linear(inputs, weight), rtol=1e-2, atol=0.1)
