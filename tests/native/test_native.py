"""Products with packed weights in C against dense products, and refused arguments; skipped if not built."""

import numpy as np
import pytest
import torch

from llm_barber import native
from llm_barber.checkpoint.bits import as_integers
from llm_barber.checkpoint.encoding import pack
from llm_barber.native import Instructions
from llm_barber.runtime.packed_linear import PackedLinear, use_native
from tests.helpers.guarded import guarded
from tests.native.test_avx512 import make_weight, parts_of

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="src/llm_barber/native/packed.c is not built here: pip install -e ."
)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, None if bias is None else torch.nn.Parameter(bias, requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (17, 40), (64, 256), (5, 1000), (3, 8)])
@pytest.mark.parametrize("threads", [1, 3])
def test_products(dtype: torch.dtype, rows: int, columns: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).masked_fill(
        torch.rand(rows, columns, generator=generator) < 0.6, 0
    )
    linear = linear_of(weight.to(dtype), torch.randn(rows, generator=generator).to(dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((columns,), (1, columns), (2, columns), (1, 3, columns), (2, 2, columns)):
            inputs = torch.randn(shape, generator=generator).to(dtype)
            assert use_native(linear.values, dtype, columns, inputs.numel() // columns, False)
            outputs = linear(inputs)
            expected = torch.nn.functional.linear(inputs.double(), weight.to(dtype).double(), linear.bias.double())
            assert outputs.dtype == dtype
            torch.testing.assert_close(
                outputs.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
            )
    finally:
        torch.set_num_threads(before)


def test_empty_and_full_rows() -> None:
    weight = torch.zeros(9, 40)
    weight[3] = torch.arange(1.0, 41)
    weight[8, 39] = 5
    assert linear_of(weight)(torch.ones(1, 40)).tolist() == [[0, 0, 0, 820, 0, 0, 0, 0, 5]]
    assert linear_of(torch.zeros(4, 8))(torch.ones(2, 8)).tolist() == [[0] * 4] * 2


def test_what_is_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(4)
    assert use_native(values, torch.float32, 16, native.PRODUCT_ROWS, differentiated=False)
    assert not use_native(values, torch.float32, 16, native.PRODUCT_ROWS + 1, differentiated=False)
    assert use_native(values.bfloat16(), torch.bfloat16, 16, native.PRODUCT_ROWS, differentiated=False)
    assert not use_native(values, torch.bfloat16, 16, native.PRODUCT_ROWS, differentiated=False)
    assert not use_native(values, torch.float32, 16, 0, differentiated=False)
    assert not use_native(values, torch.float32, 17, 1, differentiated=False)
    assert not use_native(values, torch.float32, 16, 1, differentiated=True)
    assert not use_native(values.half(), torch.float16, 16, 1, differentiated=False)
    bits = torch.zeros(2, dtype=torch.uint8)
    for columns, inputs, problem in ((16, torch.ones(5, 16), "fit together"), (12, torch.ones(1, 12), "multiple of 8")):
        with pytest.raises(ValueError, match=problem):
            native.product(values, bits, inputs, torch.empty(len(inputs), 1))
        assert columns == inputs.shape[1]
    for outputs in (torch.empty(1, 1, dtype=torch.bfloat16), torch.empty(1, 1, device="meta"), torch.empty(2, 1)):
        with pytest.raises(ValueError, match="in float32, and all parts on the CPU"):
            native.product(values, bits, torch.ones(1, 16), outputs)
    with pytest.raises(ValueError, match="1 bytes of bits for 16 weights"):
        native.find(np.zeros(16, np.int16), np.zeros(1, np.uint8))
    for layout, groups in (((3, 4, 6), 2), ((3, 4, 5), 1)):
        with pytest.raises(ValueError, match="do not fit together"):
            native.join(np.zeros(4, np.uint8), np.zeros(256, np.uint8), layout, np.zeros(3 * groups, np.uint8))
    monkeypatch.setattr(native, "library", lambda: None)
    assert not use_native(values, torch.float32, 16, 1, differentiated=False)


@pytest.mark.parametrize("level", [Instructions.AVX2, Instructions.AVX512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8, 16, 40, 200])
def test_nothing_is_read_or_written_behind_an_array(
    level: Instructions, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access beyond an array ends the process: every array ends where a page does."""
    if level > native.processor_instructions():
        pytest.skip(f"needs {level.name}")
    monkeypatch.setattr(native, "instructions", lambda: level)
    for sparsity in (0.0, 0.5, 1.0):
        weight = guarded(make_weight(3, columns, sparsity, dtype))
        values, bits = map(guarded, parts_of(weight))
        inputs, outputs = guarded(make_weight(4, columns, 0, torch.float32, seed=1)), guarded(torch.zeros(4, 3))
        native.product(values, bits, inputs, outputs)
        torch.testing.assert_close(outputs, inputs @ weight.float().T, rtol=1e-5, atol=1e-4)
        flat, mask = as_integers(weight.view(-1)), guarded(torch.zeros_like(bits))
        native.find(flat, mask.numpy())
        assert torch.equal(mask, bits)
        taken, into = guarded(torch.zeros_like(values)), guarded(torch.ones_like(weight))
        native.take(flat, mask.numpy(), as_integers(taken))
        native.put(as_integers(taken), mask.numpy(), as_integers(into.view(-1)))
        assert torch.equal(taken, values)
        assert torch.equal(into, weight)


def test_a_mask_with_too_many_bits_reads_nothing_beyond() -> None:
    """Values that are not there are zeros: the C functions know the sizes, and do not trust the mask."""
    outputs = torch.empty(1, 2)
    native.product(torch.ones(5), torch.full((4,), 255, dtype=torch.uint8), torch.ones(1, 16), outputs)
    assert outputs.tolist() == [[5, 0]]
    into = np.full(16, 9, dtype=np.int16)
    native.put(np.ones(3, np.int16), np.array([255, 255], np.uint8), into)
    assert into.tolist() == [1] * 3 + [0] * 13
    values = np.full(4, 9, dtype=np.int16)
    native.take(np.arange(1, 17, dtype=np.int16), np.array([255, 255], np.uint8), values[:2])
    assert values.tolist() == [1, 2, 9, 9]
