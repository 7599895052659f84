"""Products with packed weights, and unpacking them, in C, on PyTorch's threads.

A few rows of inputs are multiplied by AVX-512 (`avx512.c`, `vnni.c`) or AVX2 (`packed.c`), more by AMX (`amx.c`);
`unpack.c` unpacks rows of the weight. Sizes are checked here, not in C.
"""

import ctypes
import sys
import threading
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions, threads

DTYPES = (torch.bfloat16, torch.float32)  # of inputs and outputs
BLOCK_ROWS = 16  # rows of a block: `BLOCK_ROWS` of `packed.h`
STEP = 64  # columns that VNNI takes at a time
MOST_COLUMNS = 1 << 20  # a sum of more products of two int8 numbers may not fit int32
AVX2_ROWS, VNNI_ROWS, AVX512_ROWS = 4, 8, 16  # most rows of inputs of a product
AMX_ROWS = 4  # fewest rows of inputs with which AMX is faster than AVX-512 in bfloat16
TOGETHER = 1024  # rows of inputs that AMX multiplies at a time: more do not fit the caches
TILE_ROWS = 16  # rows of inputs of a tile of AMX


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
    def of(cls, bits: Tensor, shape: tuple[int, int], parts: int) -> Self:
        """Divide the rows so that each part has about as many values.

        Args:
            bits: bit mask of the weight, uint8, (out · in / 8,); rows are whole bytes.
            shape: out, in.
            parts: their number.
        """
        rows, columns = shape
        row_values = np.bitwise_count(bits.numpy().reshape(rows, columns // 8)).sum(1, dtype=np.int64)
        before = np.concatenate([[0], row_values.cumsum()])  # values before each row
        shares = [int(before[-1]) * number // parts for number in range(1, parts)]
        ends = [0, *np.searchsorted(before, shares).tolist(), rows]
        return cls(tuple(ends), tuple(before[ends].tolist()), np.append(before[:-1:BLOCK_ROWS], before[-1]))


class _Weight(ctypes.Structure):
    """A packed weight as C sees it: `packed_t` of `packed.h`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "bits", "scales", "bias", "row_ends", "value_ends", "block_starts", "openmp")
        ),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "kept", "group", "groups")),
        *((name, ctypes.c_int) for name in ("parts", "bfloat16", "level")),
    )


@cache
def _functions() -> SimpleNamespace:
    """C's functions."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return SimpleNamespace(
        multiply=native.find_function("multiply", pointer, pointer, pointer, number, pointer),
        unpack=native.find_function("unpack", pointer, size, size, pointer),
        amx_scratch=native.find_function("amx_scratch", size, size, number, result=size),
        amx_multiply=native.find_function("amx_multiply", pointer, pointer, pointer, size, number, pointer),
    )


class _Scratch(threading.local):
    """Memory that a product works in: each thread has its own."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """At least `size` bytes, until this thread asks again."""
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.memory


_scratch = _Scratch()


def can_unpack(columns: int, dtype: torch.dtype, group: int = 0) -> bool:
    """Test whether C takes a weight of `columns` columns for inputs of `dtype`; `group`: columns of a scale, or 0."""
    whole_bytes = columns % 8 == 0 and (group % 8 == 0 or group >= columns)
    return native.library() is not None and dtype in DTYPES and whole_bytes


class Weight:
    """A packed weight W, ready for products: sizes are checked and pointers are taken once, not in each product.

    It keeps its tensors alive and is never changed, so that any number of threads may use it. It is valid while
    `is_of` says so.

    Attributes:
        rows: out.
        columns: in.
        dtype: of inputs, outputs and the unpacked weight.
        most_rows: most rows of inputs that `multiply` takes.

    Args:
        values: kept values of W, (kept,), of `dtype`, or int8 if there are scales.
        bits: bit mask of W, uint8, (out · in / 8,), with as many set bits as values.
        scales: None; or bits of bfloat16 scales, int16, (out, ⌈in / group⌉).
        bias: (out,), of `dtype`; or None.
        shape: out, in.
        group: columns of a scale, or 0.
        dtype: one of `DTYPES`.
        parts: how threads share the rows if there are few rows of inputs; of many, AMX has as many parts as PyTorch
            has threads when the weight is made.

    Raises:
        ValueError: arguments do not fit together.
    """

    def __init__(
        self,
        values: Tensor,
        bits: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, int],
        group: int,
        dtype: torch.dtype,
        parts: Parts,
    ) -> None:
        (rows, columns), kept = shape, len(values)
        self._tensors = values, bits, scales, bias
        on_cpu = all(tensor is None or (tensor.is_cpu and tensor.is_contiguous()) for tensor in self._tensors)
        groups = 0 if scales is None else -(-columns // group)
        ends = parts.row_ends, parts.value_ends, parts.block_starts
        if (
            not can_unpack(columns, dtype, group)
            or not on_cpu
            or (values.dim(), values.dtype) != (1, dtype if scales is None else torch.int8)
            or (bits.dtype, bits.shape) != (torch.uint8, (rows * columns // 8,))
            or (scales is not None and (scales.dtype, scales.shape) != (torch.int16, (rows, groups)))
            or [end[-1] for end in ends] != [rows, kept, kept]
            or len(ends[0]) != len(ends[1])
            or len(ends[2]) != -(-rows // BLOCK_ROWS) + 1
            or (bias is not None and (bias.shape, bias.dtype) != ((rows,), dtype))
        ):
            raise ValueError("arguments of the product do not fit together")
        self.rows, self.columns, self.dtype = rows, columns, dtype
        level = native.instructions()
        by_steps = columns <= MOST_COLUMNS and (group % STEP == 0 or group >= columns)
        if scales is not None and level > Instructions.AVX2 and not by_steps:
            level = Instructions.AVX2
        self._choose_rows(level, scales is not None)
        within_row = -(-min(group, columns) // STEP) * STEP if level > Instructions.AVX2 else min(group, columns)
        self._pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self._ends = tuple((ctypes.c_int64 * len(end))(*end) for end in ends)
        self._scratch_bytes = (
            0 if scales is None or self._widens else -(-columns // STEP) * STEP + 4 * groups
        )  # of a row of inputs
        self._kept, self._threads = kept, torch.get_num_threads()
        pointers = *self._pointers, *map(ctypes.addressof, self._ends), threads.openmp_address()
        sizes = rows, columns, kept, within_row, groups
        self._weight = _Weight(*pointers, *sizes, len(ends[0]) - 1, dtype == torch.bfloat16, level)
        self._address, self._functions = ctypes.addressof(self._weight), _functions()

    def _choose_rows(self, level: Instructions, is_rounded: bool) -> None:
        """Choose the rows of inputs that each kernel takes."""
        narrow = self.dtype == torch.bfloat16
        best = Instructions.AVX512 if is_rounded else Instructions.AVX512BF16
        self._widens = level < best or not (narrow or is_rounded)  # for AVX2
        self.most_rows = AVX2_ROWS if self._widens else VNNI_ROWS if is_rounded else AVX512_ROWS
        self._amx_rows = sys.maxsize  # fewest rows of inputs of a product by AMX
        if narrow and level == Instructions.AMX:
            self._amx_rows, self.most_rows = VNNI_ROWS + 1 if is_rounded else AMX_ROWS, sys.maxsize

    def is_of(self, values: Tensor, bits: Tensor, scales: Tensor | None, bias: Tensor | None) -> bool:
        """Test whether these are the weight's tensors, where they were in memory."""
        own_values, own_bits, own_scales, own_bias = self._tensors
        if values is not own_values or bits is not own_bits or scales is not own_scales or bias is not own_bias:
            return False
        pointers = self._pointers
        return (
            values.data_ptr() == pointers[0]
            and bits.data_ptr() == pointers[1]
            and (scales is None or scales.data_ptr() == pointers[2])
            and (bias is None or bias.data_ptr() == pointers[3])
        )

    def multiply(self, inputs: Tensor) -> Tensor:
        """Compute inputs · Wᵀ + bias, summed in float32 and rounded once, after the bias: (…, out).

        int8 values: AMX rounds each weight, value times scale, to bfloat16. VNNI, which takes up to `VNNI_ROWS` rows,
        rounds each row of inputs to integers from −127 to 127 in the weight's groups of columns: x · (127 / largest |x|
        of the group), to nearest, ties to even. Products are summed as integers within a group, and in float32 over
        groups. Inputs below 1e-35, in a group without larger ones, are 0. A row of inputs with a NaN or an infinity has
        NaN outputs.

        Args:
            inputs: (…, in), of the weight's dtype, on the CPU; 1 to `most_rows` input rows.

        Raises:
            ValueError: inputs do not fit the weight.
        """
        shape, columns = inputs.shape, self.columns
        tokens = inputs.numel() // columns
        if shape[-1] != columns or inputs.dtype is not self.dtype or not inputs.is_cpu or tokens < 1:
            raise ValueError("inputs do not fit the weight of the product")
        if tokens > self.most_rows:
            raise ValueError(f"a product of {tokens} input rows: the most is {self.most_rows}")
        outputs = inputs.new_empty((*shape[:-1], self.rows))
        if self._widens:
            inputs = inputs.float()
        if not inputs.is_contiguous():
            inputs = inputs.contiguous()
        if tokens >= self._amx_rows:
            self._multiply_by_amx(inputs, outputs, tokens)
        else:
            size = tokens * self._scratch_bytes
            scratch = _scratch.of(size).data_ptr() if size else 0
            self._functions.multiply(self._address, inputs.data_ptr(), outputs.data_ptr(), tokens, scratch)
        return outputs

    def _multiply_by_amx(self, inputs: Tensor, outputs: Tensor, tokens: int) -> None:
        """Multiply any number of rows of inputs, bfloat16, about `TOGETHER` at a time."""
        together = -(-tokens // -(-tokens // TOGETHER))
        worth = self._kept * -(-together // TILE_ROWS) // threads.VALUES_A_THREAD
        parts = max(1, min(self._threads, -(-self.rows // BLOCK_ROWS), worth))
        scratch = _scratch.of(self._functions.amx_scratch(self.columns, together, parts)).data_ptr()
        for first in range(0, tokens, together):
            addresses = inputs.data_ptr() + 2 * first * self.columns, outputs.data_ptr() + 2 * first * self.rows
            self._functions.amx_multiply(self._address, *addresses, min(together, tokens - first), parts, scratch)

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
        self._functions.unpack(self._address, first_row // BLOCK_ROWS, -(-end_row // BLOCK_ROWS), into.data_ptr())
