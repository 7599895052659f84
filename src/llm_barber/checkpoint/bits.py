"""One bit a weight: which are not +0.0, taking those out, and putting them back. Block by block, in threads.

In C where that was built (`llm_barber.native`), which is as fast as copying memory; else with NumPy. A block is small
enough for its temporaries to stay in a core's cache: NumPy's list of places costs 8 bytes a weight, and through memory
it would cost more than the rest together.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from llm_barber import native

BLOCK = 1 << 16  # weights; a multiple of 8
BLOCK_IN_C = 1 << 19  # a call costs more than what a smaller block saves
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an item
POPCOUNT = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


def find_kept(flat: np.ndarray) -> np.ndarray:
    """Bit mask of the weights whose bits are not all zero, the first in the lowest bit; bits beyond the last are 0.

    Args:
        flat: (weights,), any integers.

    Returns:
        uint8, (⌈weights / 8⌉,).
    """
    bits = np.empty(-(-len(flat) // 8), dtype=np.uint8)
    in_c = native.usable(flat)
    block = BLOCK_IN_C if in_c else BLOCK

    def one(start: int) -> None:
        part, found = flat[start : start + block], bits[start // 8 : (start + block) // 8]
        if in_c and len(part) % 8 == 0:
            native.find(part, found)
        else:
            found[:] = np.packbits(part != 0, bitorder="little")

    _for_blocks(len(flat), block, one)
    return bits


def take_kept(flat: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The weights whose bit is set, (kept,), in their order."""
    in_c = native.usable(flat)
    block = BLOCK_IN_C if in_c else BLOCK
    starts = _value_starts(bits, len(flat), block)
    values = np.empty(starts[-1], dtype=flat.dtype)

    def one(start: int) -> None:
        number = start // block
        part, taken = flat[start : start + block], values[starts[number] : starts[number + 1]]
        if in_c and len(part) % 8 == 0:
            native.take(part, bits[start // 8 : (start + block) // 8], taken)
        else:
            part.take(_places(bits, start, len(part)), out=taken, mode="clip")

    _for_blocks(len(flat), block, one)
    return values


def put_kept(values: np.ndarray, bits: np.ndarray, into: np.ndarray) -> None:
    """The reverse of `take_kept`: values at the set bits, zeros elsewhere.

    Args:
        values: (kept,), as many as `bits` has set bits among the first (weights,).
        bits: uint8, (⌈weights / 8⌉,).
        into: (weights,), of the dtype of `values`; contiguous.

    Raises:
        ValueError: more or fewer values.
    """
    in_c = native.usable(values, into)
    block = BLOCK_IN_C if in_c else BLOCK
    starts = _value_starts(bits, len(into), block)
    if starts[-1] != len(values):
        raise ValueError(f"{len(values)} values, {starts[-1]} places")

    def one(start: int) -> None:
        number = start // block
        part, given = into[start : start + block], values[starts[number] : starts[number + 1]]
        if in_c and len(part) % 8 == 0:
            native.put(given, bits[start // 8 : (start + block) // 8], part)
        else:
            part[:] = 0
            places = torch.from_numpy(_places(bits, start, len(part)))
            # PyTorch's scatter takes two thirds of the time of NumPy's assignment by places.
            torch.from_numpy(part).scatter_(0, places, torch.from_numpy(given))

    _for_blocks(len(into), block, one)


def count_bits(bits: np.ndarray) -> int:
    """How many bits are set."""
    whole = len(bits) // 8 * 8  # eight bytes at a time
    words = np.bitwise_count(np.ascontiguousarray(bits[:whole]).view(np.uint64)).sum(dtype=np.int64)
    return int(words) + int(np.bitwise_count(bits[whole:]).sum(dtype=np.int64))


def _places(bits: np.ndarray, start: int, size: int) -> np.ndarray:
    """int64: where the set bits of a block are, from its start."""
    part = bits[start // 8 : -(-(start + size) // 8)]
    return np.flatnonzero(np.unpackbits(part, count=size, bitorder="little").view(bool))


def _value_starts(bits: np.ndarray, weights: int, block: int) -> list[int]:
    """Number of the first value of each block, and of all; bits beyond the last weight do not count."""
    starts = [0]
    for start in range(0, weights, block):
        part = bits[start // 8 : (start + block) // 8]
        extra = int(part[-1]) >> weights % 8 if start + block > weights and weights % 8 else 0
        starts.append(starts[-1] + count_bits(part) - extra.bit_count())
    return starts


def _for_blocks(weights: int, block: int, one: Callable[[int], None]) -> None:
    """Call with the start of each block, in as many threads as PyTorch uses; NumPy and PyTorch release the lock."""
    blocks = range(0, weights, block)
    threads = min(torch.get_num_threads(), len(blocks) // 4)
    if threads <= 1:
        for start in blocks:
            one(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, blocks):
                pass


def as_integers(flat: Tensor) -> np.ndarray:
    """The same memory as integers: (weights,), contiguous, on the CPU, any dtype of 1, 2, 4 or 8 bytes."""
    array: np.ndarray = flat.view(INTEGERS[flat.element_size()]).numpy()
    return array
