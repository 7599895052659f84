"""Bit masks, compared with a loop over the weights, at sizes around those of the blocks."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_barber.checkpoint import bits as module
from llm_barber.checkpoint.bits import as_integers, count_bits, find_kept, put_kept, take_kept

KINDS = (np.uint8, np.int16, np.int32, np.int64)


pytestmark = pytest.mark.usefixtures("with_and_without_c")


@given(weights=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_a_loop_over_the_weights(weights: int, density: float, seed: int, kind: type[np.integer]) -> None:
    generator = np.random.default_rng(seed)
    flat = np.where(generator.random(weights) < density, generator.integers(1, 100, weights), 0).astype(kind)
    before = module.BLOCK
    module.BLOCK = 64  # several blocks, the last one ragged
    try:
        bits = find_kept(flat)
        values = take_kept(flat, bits)
        memory = np.full(weights + 16, 7, dtype=kind)  # a margin that must stay as it is
        put_kept(values, bits, memory[8:-8])
    finally:
        module.BLOCK = before
    assert [bits[number // 8] >> number % 8 & 1 for number in range(weights)] == [int(weight != 0) for weight in flat]
    assert weights % 8 == 0 or bits[-1] >> weights % 8 == 0
    assert values.tolist() == [weight for weight in flat.tolist() if weight]
    assert count_bits(bits) == len(values)
    assert memory.tolist() == [7] * 8 + flat.tolist() + [7] * 8


def test_a_mask_for_other_values_is_refused() -> None:
    for values in (4, 6):
        with pytest.raises(ValueError, match=f"{values} values, 5 places"):
            put_kept(np.ones(values, np.int16), np.array([31], np.uint8), np.zeros(8, np.int16))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_results_do_not_depend_on_the_number_of_threads(extra: int) -> None:
    flat = as_integers(torch.randint(0, 3, (9 * module.BLOCK + extra,), dtype=torch.int32))
    masks = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            bits = find_kept(flat)
            back = np.empty_like(flat)
            put_kept(take_kept(flat, bits), bits, back)
            assert np.array_equal(back, flat)
            masks.append(bits)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*masks)


def test_bits_beyond_the_last_weight_take_nothing() -> None:
    flat = np.arange(1, 6, dtype=np.int32)
    assert take_kept(flat, np.array([255], dtype=np.uint8)).tolist() == [1, 2, 3, 4, 5]
