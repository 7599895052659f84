"""Functions of the C files, if they were built and the processor has AVX2: bit masks, and the values that they keep.

The extension is optional: an install without a C compiler succeeds, and NumPy then computes the same, more slowly.
Sizes are checked here, not in C.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llm_barber.errors import SettingsError

VERSION = 1  # of the C functions and their arguments: `VERSION` of `packed.c`
ITEMS = (2, 4)  # bytes of a weight
# Layouts of the codes of 2:4 and 4:8: bytes of codes, bytes of the bit mask that they encode, bits that encode a byte.
LAYOUTS = ((3, 4, 6), (7, 8, 7))
ISA = "LLM_BARBER_ISA"  # the environment variable that forces fewer instructions: avx2, avx512, avx512bf16 or amx


logger = logging.getLogger(__name__)


class Instructions(IntEnum):
    """Instructions for products, each with those before it."""

    AVX2 = 0
    AVX512 = 1  # AVX-512 with VBMI2 and VNNI, for int8 values
    AVX512BF16 = 2  # for bfloat16
    AMX = 3  # for bfloat16


@cache
def library() -> ctypes.CDLL | None:
    """Load the library; None if it was not built, is of another version, or cannot be used."""
    for path in sorted(Path(__file__).parent.glob("_packed*.so")):
        try:
            loaded = ctypes.CDLL(str(path))
            if loaded.packed_start() == VERSION:
                return loaded
        except (OSError, AttributeError):  # the file is of another platform, or damaged
            continue
    return None


@cache
def instructions() -> Instructions:
    """Instructions that products use here: the processor's, or fewer if the environment variable says so.

    Raises:
        SettingsError: the variable holds something else.
    """
    level = usable_instructions()
    if library() is None:
        logger.info("packed weights: unpacked by NumPy, since the C extension is missing or the processor lacks AVX2")
    else:
        logger.info("packed weights: %s; the processor has %s", level.name, processor_instructions().name)
    return level


def usable_instructions() -> Instructions:
    """`instructions`, without its message on packed weights.

    Raises:
        SettingsError: the environment variable holds something else.
    """
    limit = os.environ.get(ISA, "")
    if not limit:
        return processor_instructions()
    try:
        return min(processor_instructions(), Instructions[limit.upper()])
    except KeyError:
        names = ", ".join(name.name.lower() for name in Instructions)
        raise SettingsError(f"no instructions are called {ISA}={limit}", f"use one of {names}, or unset it") from None


def processor_instructions() -> Instructions:
    """Instructions that the processor has; AVX2 where there is no library."""
    loaded = library()
    return Instructions.AVX2 if loaded is None else Instructions(loaded.packed_instructions())


def find_function(name: str, *types: Any, result: Any = None) -> Callable[..., Any] | None:
    """Find C's `packed_{name}`; None if the extension was not built, or has no such function.

    Args:
        name: name of the function.
        types: ctypes types of its arguments.
        result: ctypes type of its result; None: it has none.
    """
    function: Callable[..., Any] | None = getattr(library(), f"packed_{name}", None)
    if function is not None:
        function.argtypes, function.restype = types, result  # type: ignore[attr-defined]
    return function


def usable(*weights: np.ndarray) -> bool:
    """Test whether `find`, `take` and `put` accept these weights."""
    return library() is not None and all(array.itemsize in ITEMS and array.flags.c_contiguous for array in weights)


def find(flat: np.ndarray, bits: np.ndarray) -> None:
    """Write the bit mask of the weights that are not zero.

    Args:
        flat: (weights,), `usable`; a multiple of 8.
        bits: uint8, (weights / 8,).
    """
    _check(flat, bits)
    _call("find", flat.ctypes, len(flat), bits.ctypes, flat.itemsize)


def take(flat: np.ndarray, bits: np.ndarray, values: np.ndarray) -> None:
    """Write the weights whose bit is set.

    Args:
        flat: (weights,), a multiple of 8.
        bits: uint8, (weights / 8,).
        values: (kept,), one value for each set bit.
    """
    _check(flat, bits, values)
    _call("take", flat.ctypes, bits.ctypes, len(flat), values.ctypes, len(values), flat.itemsize)


def put(values: np.ndarray, bits: np.ndarray, flat: np.ndarray) -> None:
    """Undo `take`: write the values where a bit is set, and zeros elsewhere."""
    _check(flat, bits, values)
    _call("put", values.ctypes, len(values), bits.ctypes, len(flat), flat.ctypes, flat.itemsize, int(instructions()))


def join(mask: np.ndarray, table: np.ndarray, layout: tuple[int, int, int], codes: np.ndarray) -> None:
    """Write the codes of a bit mask.

    Args:
        mask: uint8, (units · bytes of the mask,), a unit as of `layout`.
        table: uint8, (256,): byte of the mask → its codes.
        layout: one of `LAYOUTS`.
        codes: uint8, (units · bytes of codes,).
    """
    _by_table("join", mask, codes, table, 256, layout)


def split(codes: np.ndarray, table: np.ndarray, layout: tuple[int, int, int], mask: np.ndarray) -> None:
    """Undo `join`: write the bit mask of codes.

    Args:
        codes: as in `join`.
        table: uint8, (2 to the power of the layout's bits,): codes of a byte → byte of the mask.
        layout: one of `LAYOUTS`.
        mask: as in `join`.
    """
    _by_table("split", mask, codes, table, 1 << layout[2], layout)


def _by_table(
    name: str, mask: np.ndarray, codes: np.ndarray, table: np.ndarray, length: int, layout: tuple[int, int, int]
) -> None:
    """Call the C function `name` on codes and mask, with a table of `length` entries."""
    code_bytes, mask_bytes, _ = layout
    units = len(codes) // code_bytes
    sizes = (len(table), len(codes), len(mask)) == (length, units * code_bytes, units * mask_bytes)
    if (
        layout not in LAYOUTS
        or not sizes
        or not all(array.itemsize == 1 and array.flags.c_contiguous for array in (table, mask, codes))
    ):
        raise ValueError("a table, a mask and codes that do not fit together")
    source, target = (mask, codes) if name == "join" else (codes, mask)
    _call(name, source.ctypes, table.ctypes, units, target.ctypes, code_bytes)


def _check(flat: np.ndarray, bits: np.ndarray, values: np.ndarray | None = None) -> None:
    """Refuse a bit mask or values that do not fit their weights."""
    if len(bits) * 8 != len(flat) or bits.itemsize != 1 or not bits.flags.c_contiguous:
        raise ValueError(f"{bits.nbytes} bytes of bits for {len(flat)} weights")
    if values is not None and (values.itemsize != flat.itemsize or not values.flags.c_contiguous):
        raise ValueError(f"values of {values.dtype} for weights of {flat.dtype}, or with gaps")


def _call(name: str, *arguments: object) -> None:
    """Call the C function."""
    function = getattr(library(), f"packed_{name}")
    function(*(ctypes.c_size_t(value) if isinstance(value, int) else value for value in arguments))
