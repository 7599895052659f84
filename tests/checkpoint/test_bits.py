"""Bit masks against one weight after the other; sizes around the blocks that the work is done in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_barber.checkpoint import bits as module
from llm_barber.checkpoint.bits import as_integers, count_bits, find_kept, put_kept, take_kept


@given(weights=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_equals_weight_after_weight(weights: int, density: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    flat = np.where(generator.random(weights) < density, generator.integers(-9, 9, weights), 0).astype(np.int16)
    before = module.BLOCK
    module.BLOCK = 64  # several blocks, the last one ragged
    try:
        bits = find_kept(flat)
        values = take_kept(flat, bits)
        back = np.full(weights, 7, dtype=np.int16)
        put_kept(values, bits, back)
    finally:
        module.BLOCK = before
    assert [bits[number // 8] >> number % 8 & 1 for number in range(weights)] == [int(one != 0) for one in flat]
    assert weights % 8 == 0 or bits[-1] >> weights % 8 == 0
    assert values.tolist() == [one for one in flat.tolist() if one]
    assert count_bits(bits) == len(values)
    assert back.tolist() == flat.tolist()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_threads_give_the_same(extra: int) -> None:
    flat = as_integers(torch.randint(0, 3, (9 * module.BLOCK + extra,), dtype=torch.int32))
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            bits = find_kept(flat)
            back = np.empty_like(flat)
            put_kept(take_kept(flat, bits), bits, back)
            assert np.array_equal(back, flat)
            found.append(bits)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*found)


def test_bits_beyond_the_last_weight_take_nothing() -> None:
    flat = np.arange(1, 6, dtype=np.int32)
    assert take_kept(flat, np.array([255], dtype=np.uint8)).tolist() == [1, 2, 3, 4, 5]
