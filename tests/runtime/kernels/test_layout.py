"""Places of kept values as the kernels read them, against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_barber.checkpoint.bits import find_kept
from llm_barber.runtime.kernels import layout
from llm_barber.runtime.kernels.layout import Places, find_places


def packed_bits(kept: Tensor) -> Tensor:
    return torch.from_numpy(find_kept(kept.view(-1).to(torch.uint8).numpy()))


def value_number(places: Places, row: int, column: int) -> int | None:
    """Number of a weight's value, by the equation of `Places`; None: it is pruned."""
    word = int(places.words[row, column // 64]) & (1 << 64) - 1
    if not word >> column % 64 & 1:
        return None
    before = (word & (1 << column % 64) - 1).bit_count()
    return int(places.row_starts[row]) + int(places.starts[row, column // 64]) + before


@given(rows=st.integers(1, 9), columns=st.integers(1, 200), share=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_value_is_found(rows: int, columns: int, share: float, seed: int) -> None:
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    places = find_places(packed_bits(kept), (rows, columns))
    assert places.starts.dtype == torch.uint16
    assert places.words.shape == places.starts.shape == (rows, -(-columns // 64))
    numbers = [value_number(places, row, column) for row in range(rows) for column in range(columns)]
    assert [number is not None for number in numbers] == kept.view(-1).tolist()
    assert [number for number in numbers if number is not None] == list(range(int(kept.sum())))
    behind = [int(word) & (1 << 64) - 1 for word in places.words[:, -1]]
    assert all(word >> (columns - 1) % 64 + 1 == 0 for word in behind)


def test_whole_words_are_the_bits_themselves() -> None:
    bits = packed_bits(torch.rand(4, 128) < 0.5)
    places = find_places(bits, (4, 128))
    assert places.bits is bits
    assert places.words.data_ptr() == bits.data_ptr()


def test_bits_that_begin_anywhere_in_memory() -> None:
    bits = packed_bits(torch.rand(4, 128) < 0.5)
    moved = torch.cat([bits.new_zeros(3), bits])[3:]
    assert torch.equal(find_places(moved, (4, 128)).words, find_places(bits, (4, 128)).words)


@pytest.mark.parametrize("columns", [640, 650])
def test_long_rows_have_wider_starts(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(layout, "MOST_COLUMNS", 639)
    kept = torch.ones(2, columns, dtype=torch.bool)
    places = find_places(packed_bits(kept), (2, columns))
    assert places.starts.dtype == torch.int32
    assert value_number(places, 1, columns - 1) == 2 * columns - 1
