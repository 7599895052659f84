"""Products with packed int8 values, and unpacking them.

A few rows of inputs by AVX-512 with VBMI2 and VNNI (`vnni.c`), or by AVX2 (`rounded.c`); more by AMX (`amx.c`). Sizes
are checked here, not in C. If the extension was not built, or the processor lacks the instructions, the weight is
unpacked with NumPy.
"""

import ctypes
import logging
import sys
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions, amx
from llm_barber.native.rows import BLOCK_ROWS, Parts, UnpacksRows
from llm_barber.native.threads import openmp_functions

STEP = 64  # columns that VNNI takes at a time
MOST_COLUMNS = 1 << 20  # a sum of more products of two int8 numbers may not fit int32
DTYPES = (torch.bfloat16, torch.float32)  # of inputs and outputs
BITS_IN_BYTE = 8  # groups of columns are whole bytes of the bit mask

logger = logging.getLogger(__name__)


class Kernel(IntEnum):
    """Code that multiplies int8 values, by its instructions."""

    NUMPY = 0  # unpacks for every product
    AVX2 = 1
    VNNI = 2

    @property
    def rows(self) -> int:
        """Most rows of inputs of a product."""
        return {Kernel.NUMPY: 0, Kernel.AVX2: 4, Kernel.VNNI: 8}[self]


class _Weight(ctypes.Structure):
    """A packed weight as C sees it: `rounded_t` of `rounded.h`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "bits", "scales", "bias", "row_ends", "value_ends", "block_starts", "openmp")
        ),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "kept", "group", "groups")),
        *((name, ctypes.c_int) for name in ("parts", "bfloat16", "has_bf16")),
    )


@cache
def has_vnni() -> bool:
    """Test whether the library was built with `vnni.c`, and the processor has the instructions."""
    find = native.find_function("has_vnni", result=ctypes.c_int)
    return find is not None and bool(find())


def best_kernel() -> Kernel:
    """The fastest code that this processor and the extension have; `native.ISA` may forbid VNNI."""
    if not hasattr(native.library(), "packed_restore_rows_avx2"):  # an extension that was built earlier lacks it
        kernel = Kernel.NUMPY
    else:
        kernel = Kernel.VNNI if native.instructions() > Instructions.AVX2 and has_vnni() else Kernel.AVX2
    _report(kernel)
    return kernel


@cache
def _report(kernel: Kernel) -> None:
    """Log, once, how int8 values are multiplied."""
    logger.info(
        {
            Kernel.VNNI: "int8 values: a few rows of inputs are rounded to int8 and multiplied by VNNI"
            + (", more are multiplied by AMX" if amx.multiplies_int8() else ""),
            Kernel.AVX2: "int8 values: multiplied by AVX2, since the processor lacks AVX-512 with VBMI2 and VNNI, or "
            f"{native.ISA} forbids it",
            Kernel.NUMPY: "int8 values: unpacked by NumPy for every product, since the C extension is missing or old, "
            "or the processor lacks AVX2",
        }[kernel]
    )


def find_kernel(columns: int, group: int) -> Kernel:
    """The fastest code for a weight of `columns` columns with scales by `group` columns."""
    best = best_kernel()
    if columns % BITS_IN_BYTE:
        return Kernel.NUMPY
    if best == Kernel.VNNI and columns <= MOST_COLUMNS and (group % STEP == 0 or group >= columns):
        return Kernel.VNNI
    whole_bytes = group % BITS_IN_BYTE == 0 or group >= columns
    return min(best, Kernel.AVX2) if whole_bytes else Kernel.NUMPY


@cache
def _functions(kernel: Kernel) -> tuple[Any, Any]:
    """C's functions that multiply a weight and that unpack it."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    product, rows = (pointer, pointer, pointer, number), (pointer, size, size, pointer)
    if kernel == Kernel.VNNI:
        multiply = native.find_function("multiply_rounded", *product, size, pointer, pointer)
        return multiply, native.find_function("restore_rows", *rows)
    multiply = native.find_function("multiply_rounded_avx2", *product)
    return multiply, native.find_function("restore_rows_avx2", *rows)


class Weight(UnpacksRows):
    """A packed weight W with int8 values, ready for products: sizes are checked and pointers are taken once.

    It keeps its tensors alive and is never changed, so that any number of threads may use it. It is valid while
    `is_of` says so.

    Attributes:
        most_rows: most rows of inputs of a product.

    Args:
        values: kept values of W, int8, (kept,).
        bits: bit mask of W, uint8, (out · in / 8,), with as many set bits as values.
        scales: bits of bfloat16 scales, int16, (out, ⌈in / group⌉).
        bias: (out,), of `dtype`; or None.
        columns: in.
        group: columns of a scale.
        dtype: of inputs and outputs, one of `DTYPES`.
        parts: how threads share the rows if there are few rows of inputs; with many there are as many threads as
            PyTorch has when the weight is made.

    Raises:
        ValueError: arguments do not fit together.
    """

    def __init__(
        self,
        values: Tensor,
        bits: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        columns: int,
        group: int,
        dtype: torch.dtype,
        parts: Parts,
    ) -> None:
        rows, groups = scales.shape
        tensors = [values, bits, scales, *([] if bias is None else [bias])]
        on_cpu = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
        self.kernel = find_kernel(columns, group)
        if self.kernel == Kernel.NUMPY or dtype not in DTYPES or not on_cpu:
            raise ValueError("the product needs contiguous tensors on the CPU, and columns in whole steps")
        ends = parts.row_ends, parts.value_ends, parts.block_starts
        if (
            (values.dtype, bits.dtype, scales.dtype) != (torch.int8, torch.uint8, torch.int16)
            or (values.dim(), bits.shape, groups) != (1, (rows * columns // 8,), -(-columns // group))
            or [end[-1] for end in ends] != [rows, len(values), len(values)]
            or len(ends[0]) != len(ends[1])
            or len(ends[2]) != -(-rows // BLOCK_ROWS) + 1
            or (bias is not None and (bias.shape, bias.dtype) != ((rows,), dtype))
        ):
            raise ValueError("arguments of the product do not fit together")
        self.rows, self.columns, self.dtype = rows, columns, dtype
        has_amx = self.kernel == Kernel.VNNI and dtype == torch.bfloat16 and amx.multiplies_int8()
        self.most_rows = sys.maxsize if has_amx else self.kernel.rows
        self._kept, self._threads = len(values), torch.get_num_threads()
        self._groups, self._stride = groups, -(-columns // STEP) * STEP
        self._tensors = values, bits, scales, bias
        self._pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self._ends = tuple((ctypes.c_int64 * len(end))(*end) for end in ends)
        self._openmp = openmp_functions()
        openmp = None if self._openmp is None else ctypes.addressof(self._openmp)
        pointers = *self._pointers, *map(ctypes.addressof, self._ends), openmp
        step = STEP if self.kernel == Kernel.VNNI else BITS_IN_BYTE
        within_row = min(group, columns)  # C has 64 bits for a number that the file may make any size
        sizes = rows, columns, len(values), -(-within_row // step) * step, groups
        has_bf16 = native.instructions() >= Instructions.AVX512BF16
        self._weight = _Weight(*pointers, *sizes, len(ends[0]) - 1, dtype == torch.bfloat16, has_bf16)
        self._address = ctypes.addressof(self._weight)
        self._multiply, self._unpack = _functions(self.kernel)

    def is_of(self, values: Tensor, bits: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
        """Test whether these are the weight's tensors, where they were in memory."""
        tensors = values, bits, scales, bias
        return all(tensor is known for tensor, known in zip(tensors, self._tensors, strict=True)) and all(
            tensor is None or tensor.data_ptr() == pointer
            for tensor, pointer in zip(tensors, self._pointers, strict=True)
        )

    def multiply(self, inputs: Tensor) -> Tensor:
        """Compute inputs · Wᵀ + bias: (…, out).

        By AVX2 and AMX, inputs are not rounded, and sums are float32; AMX rounds each weight, value times scale, to
        bfloat16. By VNNI, which takes up to `kernel.rows` rows, each row of inputs is rounded to integers from −127 to
        127 in the weight's groups of columns: x · (127 / largest |x| of the group), to nearest, ties to even. Products
        are summed as integers within a group, and in float32 over groups. Inputs below 1e-35, in a group without larger
        ones, are 0. A row of inputs with a NaN or an infinity has NaN outputs. All round the result once, after the
        bias.

        Args:
            inputs: (…, in), of the weight's dtype, on the CPU; 1 to `most_rows` input rows.

        Raises:
            ValueError: inputs do not fit the weight.
        """
        shape, columns = inputs.shape, self.columns
        tokens = inputs.numel() // columns
        fits = shape[-1] == columns and 1 <= tokens <= self.most_rows
        if not fits or inputs.dtype is not self.dtype or not inputs.is_cpu:
            raise ValueError("inputs do not fit the weight of the product")
        outputs = inputs.new_empty((*shape[:-1], self.rows))
        if self.kernel == Kernel.AVX2:
            inputs = inputs.float().contiguous()
            self._multiply(self._address, inputs.data_ptr(), outputs.data_ptr(), tokens)
            return outputs
        if not inputs.is_contiguous():
            inputs = inputs.contiguous()
        if tokens > self.kernel.rows:
            shape_of_weight = self.rows, columns
            amx.multiply(self._address, True, inputs, outputs, shape_of_weight, self._kept, self._threads)
            return outputs
        rounded = torch.empty(tokens * self._stride, dtype=torch.uint8, device="cpu")
        scales = torch.empty(tokens * self._groups, dtype=torch.float32, device="cpu")
        self._multiply(
            self._address, inputs.data_ptr(), outputs.data_ptr(), tokens, self._stride, rounded.data_ptr(),
            scales.data_ptr(),
        )  # fmt: skip
        return outputs
