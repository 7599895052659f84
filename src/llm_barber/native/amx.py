"""Products of many rows of inputs with packed weights, by AMX (`amx.c`)."""

import ctypes
import threading
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions, threads
from llm_barber.native.rows import BLOCK_ROWS

TILE_ROWS = 16  # rows of inputs of a tile
FEWEST_ROWS = 4  # of inputs with which AMX is faster than AVX-512
TOGETHER = 1024  # rows of inputs that are multiplied at a time: more do not fit the caches


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


@cache
def _functions() -> SimpleNamespace:
    """C's functions; None for those that an older extension, or one of a compiler without AMX, does not have."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    product = (pointer, pointer, pointer, size, number, pointer)
    return SimpleNamespace(
        scratch=native.find_function("amx_scratch", size, size, number, result=size),
        multiply=native.find_function("amx_multiply", *product),
        multiply_rounded=native.find_function("amx_multiply_rounded", *product),
    )


def multiplies_int8() -> bool:
    """Test whether AMX multiplies weights with int8 values; an extension that was built earlier does not."""
    return native.instructions() == Instructions.AMX and _functions().multiply_rounded is not None


def multiply(
    weight: int, rounded: bool, inputs: Tensor, outputs: Tensor, shape: tuple[int, int], kept: int, most_threads: int
) -> None:
    """Multiply any number of rows of inputs, `TOGETHER` at a time.

    Args:
        weight: address of `packed_t`, or of `rounded_t` if `rounded`.
        rounded: the weight's values are int8.
        inputs: bfloat16, contiguous, (…, in).
        outputs: bfloat16, contiguous, (…, out); written.
        shape: out, in.
        kept: number of values.
        most_threads: the most threads.
    """
    (rows, columns), functions = shape, _functions()
    by_address = functions.multiply_rounded if rounded else functions.multiply
    tokens = inputs.numel() // columns
    together = -(-tokens // -(-tokens // TOGETHER))
    worth = kept * -(-together // TILE_ROWS) // threads.VALUES_A_THREAD
    parts = max(1, min(most_threads, -(-rows // BLOCK_ROWS), worth))
    scratch = _scratch.of(functions.scratch(columns, together, parts)).data_ptr()
    for first in range(0, tokens, together):
        addresses = inputs.data_ptr() + 2 * first * columns, outputs.data_ptr() + 2 * first * rows
        by_address(weight, *addresses, min(together, tokens - first), parts, scratch)
