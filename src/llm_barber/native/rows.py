"""Find where the values of a packed weight's rows begin, and share its rows among threads."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 16  # rows of a block: `BLOCK_ROWS` of `avx512.h`


@dataclass(frozen=True)
class Parts:
    """Rows of a packed weight, divided among threads.

    row_ends: rows at which the threads' parts begin and end, from 0 to all: (threads + 1,).
    value_ends: number of values before each row of `row_ends`.
    block_starts: number of values before each block of `BLOCK_ROWS` rows, and of all: int64, (blocks + 1,).
    """

    row_ends: tuple[int, ...]
    value_ends: tuple[int, ...]
    block_starts: np.ndarray

    @classmethod
    def of(cls, bits: Tensor, shape: tuple[int, int], threads: int) -> Self:
        """Divide the rows so that each thread has about as many values.

        Args:
            bits: bit mask of the weight, uint8, (out · in / 8,); rows are whole bytes.
            shape: out, in.
            threads: number of parts.
        """
        rows, columns = shape
        row_values = np.bitwise_count(bits.numpy().reshape(rows, columns // 8)).sum(1, dtype=np.int64)
        before = np.concatenate([[0], row_values.cumsum()])  # values before each row
        shares = [int(before[-1]) * number // threads for number in range(1, threads)]
        ends = [0, *np.searchsorted(before, shares).tolist(), rows]
        block_starts = np.append(before[:-1:BLOCK_ROWS], before[-1])
        return cls(tuple(ends), tuple(before[ends].tolist()), block_starts)


class UnpacksRows:
    """A packed weight, (rows, columns), that C unpacks some rows at a time, on PyTorch's threads.

    Attributes:
        rows: out.
        columns: in.
        dtype: of the unpacked weight.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    _address: int  # of the weight as C sees it
    _unpack: Any  # C's function

    def unpack(self, first_row: int, end_row: int, into: Tensor) -> None:
        """Write rows of W.

        Args:
            first_row: a multiple of `BLOCK_ROWS`.
            end_row: a multiple of `BLOCK_ROWS`, or the number of rows.
            into: contiguous, with a place for each weight of these rows, of the weight's dtype.

        Raises:
            ValueError: rows are not whole blocks, or do not fit `into`.
        """
        whole = first_row % BLOCK_ROWS == 0 and (end_row % BLOCK_ROWS == 0 or end_row == self.rows)
        inside = 0 <= first_row <= end_row <= self.rows and into.numel() == (end_row - first_row) * self.columns
        if not (whole and inside and into.is_contiguous() and into.is_cpu and into.dtype == self.dtype):
            raise ValueError("rows do not fit the place to which they are unpacked")
        self._unpack(self._address, first_row // BLOCK_ROWS, -(-end_row // BLOCK_ROWS), into.data_ptr())
