"""Packed linears: the parts that GPUs use, run on the CPU, against brute force; the choice between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_barber.checkpoint.encoding import pack
from llm_barber.runtime import packed_linear as module
from llm_barber.runtime.packed_linear import DECODE_ROWS, PackedLinear, block_starts, unpack_on_device, use_kernel


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), block=st.sampled_from([1, 8, 16, 64]), seed=st.integers(0, 999)
)
@settings(max_examples=100, deadline=None)
def test_starts_and_unpacking_by_torch(rows: int, columns: int, block: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.7] = 0
    packed = pack(weight)
    if packed is None:
        return
    linear = PackedLinear(packed, None)
    assert torch.equal(unpack_on_device(linear.values, linear.bits, linear.shape), weight)
    assert torch.equal(linear.weight, weight)
    flat = (weight != 0).view(-1)
    expected = [
        [int(flat[: row * columns + column].sum()) for column in range(0, columns, block)] for row in range(rows)
    ]
    starts = block_starts(linear.bits, linear.shape, block)
    assert starts.dtype == torch.int32
    assert starts.tolist() == expected


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert use_kernel("cuda", 1, differentiated=False)
    assert use_kernel("cuda", DECODE_ROWS, differentiated=False)
    assert not use_kernel("cuda", DECODE_ROWS + 1, differentiated=False)
    assert not use_kernel("cuda", 0, differentiated=False)
    assert not use_kernel("cuda", 1, differentiated=True)
    assert not use_kernel("cpu", 1, differentiated=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not use_kernel("cuda", 1, differentiated=False)


def test_other_dtypes_and_bias() -> None:
    weight = torch.randn(6, 16).masked_fill(torch.rand(6, 16) < 0.6, 0)
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, torch.nn.Parameter(torch.randn(6))).bfloat16()
    inputs = torch.randn(3, 16).bfloat16()
    expected = torch.nn.functional.linear(inputs, weight.bfloat16(), linear.bias)
    assert torch.equal(linear(inputs), expected)
    assert expected.dtype == torch.bfloat16
    assert "in_features=16, out_features=6" in repr(linear)
