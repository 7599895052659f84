"""Bit masks of weights: find the weights that are not +0.0, take them out, put them back.

A mask has one bit a weight. Threads take blocks: in C if that was built (`llm_barber.native`), which is as fast as
copying memory; else with NumPy.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from llm_barber import native

BLOCK = 1 << 19  # weights, a multiple of 8: the temporaries of a block stay in a core's cache or near it
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an item
POPCOUNT = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


def find_kept(flat: np.ndarray) -> np.ndarray:
    """Bit mask of the weights whose bits are not all zero, the first weight in the lowest bit.

    Bits beyond the last weight are 0.

    Args:
        flat: (weights,), any integers.

    Returns:
        uint8, (⌈weights / 8⌉,).
    """
    bits = np.empty(-(-len(flat) // 8), dtype=np.uint8)
    in_c = native.usable(flat)

    def find_block(start: int) -> None:
        part, part_bits = flat[start : start + BLOCK], bits[start // 8 : (start + BLOCK) // 8]
        if in_c and len(part) % 8 == 0:
            native.find(part, part_bits)
        else:
            part_bits[:] = np.packbits(part != 0, bitorder="little")

    _for_blocks(len(flat), find_block)
    return bits


def take_kept(flat: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The weights whose bit is set, in their order, (kept,)."""
    in_c = native.usable(flat)
    starts = _value_starts(bits, len(flat))
    values = np.empty(starts[-1], dtype=flat.dtype)

    def take_block(start: int) -> None:
        number = start // BLOCK
        part, taken = flat[start : start + BLOCK], values[starts[number] : starts[number + 1]]
        if in_c and len(part) % 8 == 0:
            native.take(part, bits[start // 8 : (start + BLOCK) // 8], taken)
        else:
            np.compress(_keep(bits, start, len(part)), part, out=taken)

    _for_blocks(len(flat), take_block)
    return values


def put_kept(values: np.ndarray, bits: np.ndarray, into: np.ndarray) -> None:
    """Put values at the set bits and zeros elsewhere: the reverse of `take_kept`.

    Args:
        values: (kept,), one for each bit that is set among the first (weights,).
        bits: uint8, (⌈weights / 8⌉,).
        into: (weights,), of the dtype of `values`; contiguous.

    Raises:
        ValueError: the number of values is not that of the set bits.
    """
    in_c = native.usable(values, into)
    starts = _value_starts(bits, len(into))
    if starts[-1] != len(values):
        raise ValueError(f"{len(values)} values, {starts[-1]} places")

    def put_block(start: int) -> None:
        number = start // BLOCK
        part, part_values = into[start : start + BLOCK], values[starts[number] : starts[number + 1]]
        if in_c and len(part) % 8 == 0:
            native.put(part_values, bits[start // 8 : (start + BLOCK) // 8], part)
        else:
            part[:] = 0
            part[_keep(bits, start, len(part))] = part_values

    _for_blocks(len(into), put_block)


def count_bits(bits: np.ndarray) -> int:
    """Number of bits that are set."""
    end = len(bits) // 8 * 8  # up to here, eight bytes are counted at a time
    count = np.bitwise_count(np.ascontiguousarray(bits[:end]).view(np.uint64)).sum(dtype=np.int64)
    return int(count) + int(np.bitwise_count(bits[end:]).sum(dtype=np.int64))


def _keep(bits: np.ndarray, start: int, size: int) -> np.ndarray:
    """Keep mask of a block, bool, (size,)."""
    part = bits[start // 8 : -(-(start + size) // 8)]
    return np.unpackbits(part, count=size, bitorder="little").view(bool)


def _value_starts(bits: np.ndarray, weights: int) -> list[int]:
    """Index of each block's first value, and the number of all; bits beyond the last weight do not count."""
    starts = [0]
    for start in range(0, weights, BLOCK):
        part = bits[start // 8 : (start + BLOCK) // 8]
        extra = int(part[-1]) >> weights % 8 if start + BLOCK > weights and weights % 8 else 0
        starts.append(starts[-1] + count_bits(part) - extra.bit_count())
    return starts


def _for_blocks(weights: int, function: Callable[[int], None]) -> None:
    """Call a function with the start of each block, in as many threads as PyTorch uses.

    NumPy and the C functions release Python's lock.
    """
    blocks = range(0, weights, BLOCK)
    threads = min(torch.get_num_threads(), len(blocks) // 4)
    if threads <= 1:
        for start in blocks:
            function(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(function, blocks))


def as_integers(flat: Tensor) -> np.ndarray:
    """The same memory as integers, (weights,).

    The tensor is contiguous and on the CPU; its dtype has 1, 2, 4 or 8 bytes.
    """
    array: np.ndarray = flat.view(INTEGERS[flat.element_size()]).numpy()
    return array
