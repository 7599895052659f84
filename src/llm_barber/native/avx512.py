"""Products with packed weights by AVX-512, in `avx512.c`.

Sizes are checked here, not in C. If the extension was not built, or the processor lacks the instructions,
`native.product` (AVX2) or unpacking takes its place.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions

ROWS = 16  # most rows of inputs of a product
FAST_ROWS = 8  # most rows of inputs with which a product is faster than unpacking the weight and multiplying


class _Product(ctypes.Structure):
    """Arguments of a product: `product_t` of `avx512.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "bits", "inputs", "bias", "outputs")),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "kept")),
        *((name, ctypes.c_int) for name in ("tokens", "values_bfloat16", "outputs_bfloat16", "level")),
    )


class _OpenMP(ctypes.Structure):
    """`openmp_t` of `avx512.c`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "thread_number", "thread_count"))


@cache
def _openmp() -> _OpenMP | None:
    """Functions of the OpenMP library that PyTorch has loaded; None: there is none, or it is not found (macOS)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    for path in dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*)$", maps, re.MULTILINE)):
        try:
            library = ctypes.CDLL(path)
            functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return _OpenMP(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return None


def can_multiply(columns: int, values: torch.dtype, inputs: torch.dtype) -> bool:
    """Test whether `multiply` accepts weights of `columns` columns with these dtypes."""
    if native.library() is None or native.instructions() == Instructions.AVX2:
        return False
    return columns % 8 == 0 and values == inputs and values in (torch.bfloat16, torch.float32)


def multiply(
    values: Tensor,
    bits: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    row_ends: Sequence[int],
    value_ends: Sequence[int],
) -> Tensor:
    """Compute inputs · Wᵀ + bias, summed in float32 and rounded once.

    Args:
        values: kept values of W, (kept,), bfloat16 or float32.
        bits: bit mask of W, uint8, (out · in / 8,), with as many set bits as values.
        inputs: (input rows, in), contiguous, of the dtype of `values`; at most `ROWS` input rows.
        bias: (out,), of the dtype of `values`; or None.
        row_ends: rows of W at which the threads' parts begin and end, from 0 to out: (parts + 1,).
        value_ends: number of values before each row of `row_ends`.

    Returns:
        (input rows, out), of the dtype of `values`.

    Raises:
        ValueError: arguments do not fit together.
    """
    (tokens, columns), rows, kept, dtype = inputs.shape, row_ends[-1], values.shape[0], values.dtype
    tensors = [values, bits, inputs, *([] if bias is None else [bias])]
    if not can_multiply(columns, dtype, inputs.dtype) or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the product needs contiguous tensors of one dtype, and columns that are a multiple of 8")
    fits = bits.shape[0] * 8 == rows * columns and value_ends[-1] == kept and 1 <= tokens <= ROWS
    if (
        not fits
        or len(row_ends) != len(value_ends)
        or (bias is not None and (bias.shape[0], bias.dtype) != (rows, dtype))
    ):
        raise ValueError("arguments of the product do not fit together")
    narrow = dtype == torch.bfloat16
    level = native.instructions() if narrow else Instructions.AVX512
    widened = inputs.float() if narrow and level == Instructions.AVX512 else inputs
    outputs = torch.empty(tokens, rows, dtype=dtype)
    product = _Product(
        values.data_ptr(), bits.data_ptr(), widened.data_ptr(), None if bias is None else bias.data_ptr(),
        outputs.data_ptr(), rows, columns, kept, tokens, narrow, narrow, level,
    )  # fmt: skip
    ends = ctypes.c_int64 * len(row_ends)
    loaded = native.library()
    assert loaded is not None
    openmp = _openmp()
    threads = None if openmp is None else ctypes.byref(openmp)
    loaded.packed_multiply(ctypes.byref(product), len(row_ends) - 1, ends(*row_ends), ends(*value_ends), threads)
    return outputs
