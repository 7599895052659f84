"""Rows of packed weights divided among threads, against brute force."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_barber.native.rows import BLOCK_ROWS, Parts


@given(rows=st.integers(1, 70), width=st.integers(1, 5), threads=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_parts(rows: int, width: int, threads: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kept = generator.random((rows, 8 * width)) < generator.random((rows, 1))
    parts = Parts.of(torch.from_numpy(np.packbits(kept, bitorder="little")), (rows, 8 * width), threads)
    before = [int(kept[:row].sum()) for row in range(rows + 1)]
    assert parts.block_starts.tolist() == [*before[:rows:BLOCK_ROWS], before[rows]]
    assert parts.value_ends == tuple(before[end] for end in parts.row_ends)
    assert len(parts.row_ends) == threads + 1
    assert (parts.row_ends[0], parts.row_ends[-1]) == (0, rows)
    assert list(parts.row_ends) == sorted(parts.row_ends)
    # A part has at most its share and a row more.
    shares = [end - first for first, end in zip(parts.value_ends, parts.value_ends[1:], strict=False)]
    assert max(shares) <= before[rows] / threads + 8 * width + 1
