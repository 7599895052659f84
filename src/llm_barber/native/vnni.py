"""Products with packed int8 values, and unpacking them, by AVX-512 with VBMI2 and VNNI: `vnni.c`.

Sizes are checked here, not in C. If the extension was not built, or the processor lacks the instructions, the weight is
unpacked with NumPy.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions, avx512
from llm_barber.native.rows import BLOCK_ROWS, Parts

ROWS = 8  # most rows of inputs of a product
STEP = 64  # columns that C takes at a time
MOST_COLUMNS = 1 << 20  # a sum of more products of two int8 numbers may not fit int32
DTYPES = (torch.bfloat16, torch.float32)  # of inputs and outputs


class _Weight(ctypes.Structure):
    """A packed weight as C sees it: `rounded_t` of `vnni.c`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("values", "bits", "scales", "bias", "row_ends", "value_ends", "block_starts", "openmp")
        ),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "kept", "group", "groups")),
        *((name, ctypes.c_int) for name in ("parts", "bfloat16")),
    )


@cache
def has_instructions() -> bool:
    """Test whether the library was built with `vnni.c`, and the processor has the instructions."""
    find = getattr(native.library(), "packed_has_vnni", None)  # an extension that was built earlier lacks it
    return find is not None and bool(find())


def can_multiply(columns: int, group: int) -> bool:
    """Test whether a `Weight` of `columns` columns with scales by `group` columns can be multiplied."""
    if native.library() is None or native.instructions() == Instructions.AVX2 or not has_instructions():
        return False
    if columns > MOST_COLUMNS:
        return False
    return columns % 8 == 0 and (group % STEP == 0 or group >= columns)


class Weight:
    """A packed weight W with int8 values, ready for products: sizes are checked and pointers are taken once.

    It keeps its tensors alive and is never changed, so that any number of threads may use it. It is valid while
    `is_of` says so.

    Args:
        values: kept values of W, int8, (kept,).
        bits: bit mask of W, uint8, (out · in / 8,), with as many set bits as values.
        scales: bits of bfloat16 scales, int16, (out, ⌈in / group⌉).
        bias: (out,), of `dtype`; or None.
        columns: in.
        group: columns of a scale.
        dtype: of inputs and outputs, one of `DTYPES`.
        parts: how threads share the rows.

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
        if not can_multiply(columns, group) or dtype not in DTYPES or not on_cpu:
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
        self._groups, self._stride = groups, -(-columns // STEP) * STEP
        self._tensors = values, bits, scales, bias
        self._pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self._ends = tuple((ctypes.c_int64 * len(end))(*end) for end in ends)
        self._openmp = avx512.openmp_functions()
        openmp = None if self._openmp is None else ctypes.addressof(self._openmp)
        pointers = *self._pointers, *map(ctypes.addressof, self._ends), openmp
        sizes = rows, columns, len(values), -(-group // STEP) * STEP, groups
        self._weight = _Weight(*pointers, *sizes, len(ends[0]) - 1, dtype == torch.bfloat16)
        self._address = ctypes.addressof(self._weight)
        loaded = native.library()
        assert loaded is not None
        self._multiply, self._restore = loaded.packed_multiply_rounded, loaded.packed_restore_rounded
        pointer = ctypes.c_void_p
        self._multiply.argtypes = (pointer, pointer, pointer, ctypes.c_int, ctypes.c_size_t, pointer, pointer)
        self._restore.argtypes = (pointer, pointer)
        self._multiply.restype = self._restore.restype = None

    def is_of(self, values: Tensor, bits: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
        """Test whether these are the weight's tensors, where they were in memory."""
        tensors = values, bits, scales, bias
        return all(tensor is own for tensor, own in zip(tensors, self._tensors, strict=True)) and all(
            tensor is None or tensor.data_ptr() == pointer
            for tensor, pointer in zip(tensors, self._pointers, strict=True)
        )

    def multiply(self, inputs: Tensor) -> Tensor:
        """Compute inputs · Wᵀ + bias with rounded inputs: (…, out).

        Each row of inputs is rounded to integers from −127 to 127 in the weight's groups of columns: x · (127 / largest
        |x| of the group), to nearest, ties to even. Products are summed as integers within a group, and in float32 over
        groups; the result is rounded once, after the bias. Inputs below 1e-35, in a group without larger ones, are 0. A
        row of inputs with a NaN or an infinity has NaN outputs.

        Args:
            inputs: (…, in), of the weight's dtype, on the CPU; 1 to `ROWS` input rows.

        Raises:
            ValueError: inputs do not fit the weight.
        """
        shape, columns = inputs.shape, self.columns
        tokens = inputs.numel() // columns
        if shape[-1] != columns or inputs.dtype is not self.dtype or not inputs.is_cpu or not 1 <= tokens <= ROWS:
            raise ValueError("inputs do not fit the weight of the product")
        outputs = inputs.new_empty((*shape[:-1], self.rows))
        if not inputs.is_contiguous():
            inputs = inputs.contiguous()
        rounded = torch.empty(tokens * self._stride, dtype=torch.uint8, device="cpu")
        scales = torch.empty(tokens * self._groups, dtype=torch.float32, device="cpu")
        self._multiply(
            self._address, inputs.data_ptr(), outputs.data_ptr(), tokens, self._stride, rounded.data_ptr(),
            scales.data_ptr(),
        )  # fmt: skip
        return outputs

    def unpack(self, into: Tensor) -> None:
        """Write W, of the weight's dtype, on PyTorch's threads.

        Args:
            into: contiguous, with a place for each weight.

        Raises:
            ValueError: it does not fit.
        """
        fits = into.numel() == self.rows * self.columns and into.dtype == self.dtype
        if not (fits and into.is_contiguous() and into.is_cpu):
            raise ValueError("the weight does not fit the place to which it is unpacked")
        self._restore(self._address, into.data_ptr())
