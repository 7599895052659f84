"""`packed.c`, where it was built and the processor has AVX2; without it the same is done with NumPy, slower.

It is an optional extension: an install without a C compiler goes on without it. Sizes are checked here, not in C.
"""

import ctypes
import os
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ITEMS = (2, 4)  # bytes of a weight
LAYOUTS = ((3, 4, 6), (7, 8, 7))  # of 2:4 and 4:8
ISA = "LLM_BARBER_ISA"  # the environment variable that forces fewer instructions: avx2, avx512 or avx512bf16
PRODUCT_ROWS = 4  # of inputs


class Instructions(IntEnum):
    """Instructions for products, each with those before it."""

    AVX2 = 0
    AVX512 = 1  # AVX-512 with VBMI2
    AVX512BF16 = 2


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    for path in sorted(Path(__file__).parent.glob("_packed*.so")):
        try:
            found = ctypes.CDLL(str(path))
            if found.packed_start():
                return found
        except (OSError, AttributeError):  # of another platform, or damaged
            continue
    return None


@cache
def instructions() -> Instructions:
    """Instructions that products use here: the processor's, or fewer if the environment variable says so.

    Raises:
        ValueError: the variable holds something else.
    """
    loaded = library()
    find_level = getattr(loaded, "packed_product_level", None)  # an extension that was built earlier lacks it
    level = Instructions(find_level() if find_level is not None else 0)
    wanted = os.environ.get(ISA, "")
    if not wanted:
        return level
    try:
        return min(level, Instructions[wanted.upper()])
    except KeyError:
        raise ValueError(f"{ISA}={wanted}: use {', '.join(name.name.lower() for name in Instructions)}") from None


def usable(*weights: np.ndarray) -> bool:
    """Whether `find`, `take` and `put` take these."""
    return library() is not None and all(one.itemsize in ITEMS and one.flags.c_contiguous for one in weights)


def find(flat: np.ndarray, bits: np.ndarray) -> None:
    """Write the bit mask of the weights that are not zero.

    Args:
        flat: (weights,), as `usable` has them; a multiple of 8.
        bits: uint8, (weights / 8,).
    """
    _check(flat, bits)
    _call("find", flat, flat.ctypes, len(flat), bits.ctypes)


def take(flat: np.ndarray, bits: np.ndarray, values: np.ndarray) -> None:
    """Write the weights whose bit is set.

    Args:
        flat: (weights,), a multiple of 8.
        bits: uint8, (weights / 8,).
        values: (kept,), as many as there are set bits.
    """
    _check(flat, bits)
    _call("take", flat, flat.ctypes, bits.ctypes, len(flat), values.ctypes, len(values))


def put(values: np.ndarray, bits: np.ndarray, into: np.ndarray) -> None:
    """The reverse of `take`, with zeros elsewhere."""
    _check(into, bits)
    variant = "_512" if instructions() > Instructions.AVX2 else ""
    _call("put", into, values.ctypes, len(values), bits.ctypes, len(into), into.ctypes, variant=variant)


def join(mask: np.ndarray, table: np.ndarray, layout: tuple[int, int, int], places: np.ndarray) -> None:
    """Write the codes of a bit mask.

    Args:
        mask: uint8, (groups · together,).
        table: uint8, (256,): byte of the mask → its codes.
        layout: one of `LAYOUTS`: bytes of a group's codes; bytes of the mask together; bits of the codes of one.
        places: uint8, (groups · bytes,).
    """
    _by_table("join", mask, table, 256, layout, mask, places)


def split(places: np.ndarray, table: np.ndarray, layout: tuple[int, int, int], mask: np.ndarray) -> None:
    """The reverse of `join`, by a table of codes → byte of the mask, of 2 to the power of the codes' bits."""
    _by_table("split", places, table, 1 << layout[2], layout, mask, places)


def _by_table(
    name: str, first: np.ndarray, table: np.ndarray, length: int, layout: tuple[int, int, int],
    mask: np.ndarray, places: np.ndarray,
) -> None:  # fmt: skip
    width, together, _ = layout
    groups = len(places) // width
    sizes = (len(table), len(places), len(mask)) == (length, groups * width, groups * together)
    if (
        layout not in LAYOUTS
        or not sizes
        or not all(one.itemsize == 1 and one.flags.c_contiguous for one in (table, mask, places))
    ):
        raise ValueError("a table, a mask and codes that do not fit together")
    other = places if first is mask else mask
    getattr(library(), f"packed_{name}")(first.ctypes, table.ctypes, ctypes.c_size_t(groups), other.ctypes, width)


def can_multiply(columns: int, dtype: torch.dtype) -> bool:
    """Whether `product` takes weights of so many columns."""
    return library() is not None and columns % 8 == 0 and dtype in (torch.bfloat16, torch.float32)


def product(values: Tensor, bits: Tensor, inputs: Tensor, outputs: Tensor) -> None:
    """outputs = inputs · Wᵀ, in float32, for some rows of W.

    Args:
        values: bfloat16 or float32, (kept,), of these rows.
        bits: uint8, (rows · in / 8,), of these rows; as many set bits as values.
        inputs: float32, (up to `PRODUCT_ROWS`, in), contiguous.
        outputs: float32, (as many, rows); rows next to each other.
    """
    rows, columns = outputs.shape[1], inputs.shape[1]
    found = library()
    parts = (values, bits, inputs)
    if found is None or not can_multiply(columns, values.dtype) or not all(one.is_contiguous() for one in parts):
        raise ValueError("the product needs contiguous parts, and columns that are a multiple of 8")
    if len(bits) * 8 != rows * columns or not 1 <= len(inputs) <= PRODUCT_ROWS or outputs.stride(1) != 1:
        raise ValueError("parts of the product do not fit together")
    found.packed_product(
        *(ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(len(values)), ctypes.c_void_p(bits.data_ptr())),
        *(ctypes.c_size_t(rows), ctypes.c_size_t(columns), ctypes.c_void_p(inputs.data_ptr())),
        *(ctypes.c_void_p(outputs.data_ptr()), ctypes.c_size_t(outputs.stride(0))),
        *(int(values.dtype == torch.bfloat16), len(inputs)),
    )


def _check(flat: np.ndarray, bits: np.ndarray) -> None:
    if len(bits) * 8 != len(flat) or not bits.flags.c_contiguous:
        raise ValueError(f"{len(bits)} bytes of bits for {len(flat)} weights")


def _call(name: str, flat: np.ndarray, *arguments: object, variant: str = "") -> None:
    function = getattr(library(), f"packed_{name}{8 * flat.itemsize}{variant}")
    function(*(ctypes.c_size_t(one) if isinstance(one, int) else one for one in arguments))
