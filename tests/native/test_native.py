"""Bit masks and kept values in C: within their arrays, whatever the mask says; skipped if not built."""

import numpy as np
import pytest
import torch

from llm_barber import native
from llm_barber.checkpoint.bits import as_integers
from llm_barber.checkpoint.encoding import pack
from llm_barber.native import Instructions
from llm_barber.runtime.packed_linear import PackedLinear
from tests.helpers.guarded import guarded
from tests.native.test_unrounded import make_weight, parts_of

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="src/llm_barber/native/packed.c is not built here: pip install -e ."
)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, None if bias is None else torch.nn.Parameter(bias, requires_grad=False))


def test_empty_and_full_rows() -> None:
    weight = torch.zeros(9, 40)
    weight[3] = torch.arange(1.0, 41)
    weight[8, 39] = 5
    assert linear_of(weight)(torch.ones(1, 40)).tolist() == [[0, 0, 0, 820, 0, 0, 0, 0, 5]]
    assert linear_of(torch.zeros(4, 8))(torch.ones(2, 8)).tolist() == [[0] * 4] * 2


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
        flat, mask = as_integers(weight.view(-1)), guarded(torch.zeros_like(bits))
        native.find(flat, mask.numpy())
        assert torch.equal(mask, bits)
        taken, into = guarded(torch.zeros_like(values)), guarded(torch.ones_like(weight))
        native.take(flat, mask.numpy(), as_integers(taken))
        native.put(as_integers(taken), mask.numpy(), as_integers(into.view(-1)))
        assert torch.equal(taken, values)
        assert torch.equal(into, weight)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="values of float16 for weights of float32"):
        native.put(np.zeros(3, np.float16), np.zeros(2, np.uint8), np.zeros(16, np.float32))
    with pytest.raises(ValueError, match="1 bytes of bits for 16 weights"):
        native.find(np.zeros(16, np.int16), np.zeros(1, np.uint8))
    for layout, groups in (((3, 4, 6), 2), ((3, 4, 5), 1)):
        with pytest.raises(ValueError, match="do not fit together"):
            native.join(np.zeros(4, np.uint8), np.zeros(256, np.uint8), layout, np.zeros(3 * groups, np.uint8))


def test_a_mask_with_too_many_bits_reads_nothing_beyond() -> None:
    """Values that are not there are zeros: the C functions know the sizes, and do not trust the mask."""
    into = np.full(16, 9, dtype=np.int16)
    native.put(np.ones(3, np.int16), np.array([255, 255], np.uint8), into)
    assert into.tolist() == [1] * 3 + [0] * 13
    values = np.full(4, 9, dtype=np.int16)
    native.take(np.arange(1, 17, dtype=np.int16), np.array([255, 255], np.uint8), values[:2])
    assert values.tolist() == [1, 2, 9, 9]
