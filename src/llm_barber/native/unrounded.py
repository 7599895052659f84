"""Products with packed float values, and unpacking them.

A few rows of inputs by AVX-512 (`avx512.c`) or AVX2 (`packed.c`), more by AMX (`amx.c`). `unpack512.c` unpacks rows of
the weight. Sizes are checked here, not in C. If the extension was not built, or the processor lacks AVX2, NumPy unpacks
weights.
"""

import ctypes
import sys
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions, amx
from llm_barber.native.rows import BLOCK_ROWS, Parts, UnpacksRows
from llm_barber.native.threads import openmp_functions

ROWS = 16  # most rows of inputs of a product by AVX-512
WIDENED_ROWS = 8  # without BF16: with more rows of bfloat16 it is faster to unpack the weight and multiply
AVX2_ROWS = 4  # most rows of inputs of a product by AVX2


class _Weight(ctypes.Structure):
    """A packed weight as C sees it: `packed_t` of `avx512.h`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "bits", "bias", "row_ends", "value_ends", "block_starts", "openmp")
        ),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "kept")),
        *((name, ctypes.c_int) for name in ("parts", "bfloat16", "level")),
    )


@cache
def _functions() -> SimpleNamespace:
    """C's functions; None for those that the extension does not have."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    product = (pointer, pointer, pointer, ctypes.c_int)
    return SimpleNamespace(
        multiply=native.find_function("multiply", *product),
        multiply_avx2=native.find_function("multiply_avx2", *product),
        unpack=native.find_function("unpack", pointer, size, size, pointer),
    )


def can_multiply(columns: int, values: torch.dtype, inputs: torch.dtype) -> bool:
    """Test whether a `Weight` of `columns` columns with these dtypes can be multiplied."""
    loaded = native.library()
    by_avx2 = native.instructions() == Instructions.AVX2
    if loaded is None or (by_avx2 and not hasattr(loaded, "packed_multiply_avx2")):  # one built earlier lacks it
        return False
    return columns % 8 == 0 and values == inputs and values in (torch.bfloat16, torch.float32)


class Weight(UnpacksRows):
    """A packed weight W, ready for products: sizes are checked and pointers are taken once, not in each product.

    It keeps its tensors alive and is never changed, so that any number of threads may use it. It is valid while
    `is_of` says so.

    Attributes:
        fast_rows: most rows of inputs with which `multiply` is faster than `unpack` and a dense product.

    Args:
        values: kept values of W, (kept,), bfloat16 or float32.
        bits: bit mask of W, uint8, (out · in / 8,), with as many set bits as values.
        bias: (out,), of the dtype of `values`; or None.
        shape: out, in.
        parts: how threads share the rows if there are few rows of inputs.
        threads: the most threads of a product with many rows of inputs.

    Raises:
        ValueError: arguments do not fit together.
    """

    def __init__(
        self,
        values: Tensor,
        bits: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        parts: Parts,
        threads: int,
    ) -> None:
        (rows, columns), kept, self.dtype = shape, values.shape[0], values.dtype
        tensors = [values, bits, *([] if bias is None else [bias])]
        on_cpu = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
        if not can_multiply(columns, self.dtype, self.dtype) or not on_cpu:
            raise ValueError("the product needs contiguous tensors on the CPU, and columns that are a multiple of 8")
        ends = parts.row_ends, parts.value_ends, parts.block_starts
        if (
            (bits.dtype, bits.shape[0] * 8) != (torch.uint8, rows * columns)
            or [end[-1] for end in ends] != [rows, kept, kept]
            or len(ends[0]) != len(ends[1])
            or len(ends[2]) != -(-rows // BLOCK_ROWS) + 1
            or (bias is not None and (bias.shape, bias.dtype) != ((rows,), self.dtype))
        ):
            raise ValueError("arguments of the product do not fit together")
        self.rows, self.columns = shape
        self._tensors = values, bits, bias
        self._pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self._ends = tuple((ctypes.c_int64 * len(end))(*end) for end in ends)
        self._openmp = openmp_functions()
        narrow = self.dtype == torch.bfloat16
        level = native.instructions() if narrow else min(native.instructions(), Instructions.AVX512)
        self._by_avx2 = level == Instructions.AVX2
        self._widens = narrow and level == Instructions.AVX512
        self._amx_rows = amx.FEWEST_ROWS if level == Instructions.AMX else sys.maxsize
        if self._widens:
            self.fast_rows = WIDENED_ROWS
        else:
            self.fast_rows = {Instructions.AMX: sys.maxsize, Instructions.AVX2: AVX2_ROWS}.get(level, ROWS)
        self._kept, self._threads = kept, threads
        pointers = *self._pointers, *map(ctypes.addressof, self._ends)
        openmp = None if self._openmp is None else ctypes.addressof(self._openmp)
        self._weight = _Weight(*pointers, openmp, rows, columns, kept, len(ends[0]) - 1, narrow, level)
        self._address = ctypes.addressof(self._weight)
        self._functions = _functions()
        self._unpack = self._functions.unpack

    def is_of(self, values: Tensor, bits: Tensor, bias: Tensor | None) -> bool:
        """Test whether these are the weight's tensors, where they were in memory."""
        own_values, own_bits, own_bias = self._tensors
        if values is not own_values or bits is not own_bits or bias is not own_bias:
            return False
        pointers = self._pointers
        return (
            values.data_ptr() == pointers[0]
            and bits.data_ptr() == pointers[1]
            and (bias is None or bias.data_ptr() == pointers[2])
        )

    def multiply(self, inputs: Tensor) -> Tensor:
        """Compute inputs · Wᵀ + bias, summed in float32 and rounded once: (…, out).

        Args:
            inputs: (…, in), of the weight's dtype, on the CPU; 1 to `ROWS` input rows, with AVX2 `AVX2_ROWS`, with
                AMX any number of bfloat16. Up to `fast_rows` this is faster than `unpack` and a dense product.

        Raises:
            ValueError: inputs do not fit the weight.
        """
        shape, columns = inputs.shape, self.columns
        tokens = inputs.numel() // columns
        if shape[-1] != columns or inputs.dtype is not self.dtype or not inputs.is_cpu or tokens < 1:
            raise ValueError("inputs do not fit the weight of the product")
        if self._by_avx2:
            return self._multiply_by_avx2(inputs, tokens)
        outputs = inputs.new_empty((*shape[:-1], self.rows))
        if self._widens:
            inputs = inputs.float()
        if not inputs.is_contiguous():
            inputs = inputs.contiguous()
        if tokens >= self._amx_rows:
            shape_of_weight = self.rows, columns
            amx.multiply(self._address, False, inputs, outputs, shape_of_weight, self._kept, self._threads)
        elif tokens <= ROWS:
            self._functions.multiply(self._address, inputs.data_ptr(), outputs.data_ptr(), tokens)
        else:
            raise ValueError(f"a product of {tokens} input rows: the most is {ROWS}")
        return outputs

    def _multiply_by_avx2(self, inputs: Tensor, tokens: int) -> Tensor:
        if tokens > AVX2_ROWS:
            raise ValueError(f"a product of {tokens} input rows: the most is {AVX2_ROWS}")
        shape, bias = (*inputs.shape[:-1], self.rows), self._tensors[2]
        inputs = inputs.float().contiguous()
        sums = inputs.new_empty(shape)
        self._functions.multiply_avx2(self._address, inputs.data_ptr(), sums.data_ptr(), tokens)
        if bias is not None:
            sums += bias
        return sums.to(self.dtype)
