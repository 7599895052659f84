"""Pack a pruned weight into fewer bytes: its kept values and their places.

A weight of any float dtype comes back bit for bit.

`bitmask`: one bit a weight, set where the weight is kept. `2:4` and `4:8`: every group of M consecutive weights keeps
exactly N (a group with fewer keeps zeros, too), and a code says which (`group_codes.py`). A weight is kept if it is not
+0.0. docs/reference/packed-format.md describes the encoding for other readers.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from llm_barber.checkpoint.bits import as_integers, count_bits, find_kept, put_kept, take_kept
from llm_barber.checkpoint.group_codes import GroupCodes, group_codes
from llm_barber.checkpoint.memory import Memory, ordinary_memory


class Encoding(StrEnum):
    """Encoding of the places of the kept values."""

    BITMASK = "bitmask"
    TWO_OF_FOUR = "2:4"
    FOUR_OF_EIGHT = "4:8"

    @property
    def group_codes(self) -> GroupCodes | None:
        """The codes of its groups; None: the encoding has no groups."""
        if self is Encoding.BITMASK:
            return None
        n, m = self.value.split(":")
        return group_codes(int(n), int(m))


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    `shape`: (out, in). `values`: the kept values, row by row, (kept,). `places`: uint8, (bytes,), by `encoding`.
    """

    shape: tuple[int, int]
    encoding: Encoding
    values: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of values and places."""
        return self.values.numel() * self.values.element_size() + self.places.numel()


def pack(weight: Tensor) -> Packed | None:
    """Pack a weight with the encoding of the fewest bytes.

    None: no encoding has fewer bytes than the weight itself.

    Args:
        weight: (out, in), any dtype of 1, 2, 4 or 8 bytes, on the CPU.
    """
    rows, columns = weight.shape
    flat = as_integers(weight.contiguous().view(-1))
    bits = find_kept(flat)
    size, encoding = smallest_encoding(bits, rows * columns, columns, flat.itemsize)
    if size >= flat.nbytes:
        return None
    places, filled = encode(bits, encoding, rows * columns)
    values = torch.from_numpy(take_kept(flat, filled)).view(weight.dtype)
    return Packed((rows, columns), encoding, values, torch.from_numpy(places))


def smallest_encoding(bits: np.ndarray, weights: int, columns: int, item: int) -> tuple[int, Encoding]:
    """Find the encoding of the fewest bytes.

    Args:
        bits: bit mask of the kept weights, uint8, (⌈weights / 8⌉,).
        weights: number of weights.
        columns: length of a row.
        item: bytes of a value.

    Returns:
        Bytes of values and places; the encoding.
    """
    size, encoding = _size(Encoding.BITMASK, bits, weights, columns, item), Encoding.BITMASK
    for grouped in (Encoding.TWO_OF_FOUR, Encoding.FOUR_OF_EIGHT):
        grouped_size = _size(grouped, bits, weights, columns, item)
        if grouped_size is not None:
            size, encoding = min((size, encoding), (grouped_size, grouped))
            break  # a weight that fits 2:4 fits 4:8, too, in more bytes
    assert size is not None
    return size, encoding


def encode(bits: np.ndarray, encoding: Encoding, weights: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode the places of the kept weights, whose groups keep at most N.

    Args:
        bits: as in `smallest_encoding`.
        encoding: the encoding.
        weights: number of weights.

    Returns:
        The places, uint8, (bytes,); the bit mask of the weights with a value: groups that keep fewer than N have N.
    """
    codes = encoding.group_codes
    return (bits, bits) if codes is None else codes.encode(bits, weights)


def unpack(packed: Packed, memory: Memory = ordinary_memory) -> Tensor:
    """Unpack a weight, (out, in).

    Args:
        packed: the packed weight, maybe from a hostile file.
        memory: for the weight.

    Raises:
        ValueError: sizes or counts do not fit together. They are checked before memory of the declared size is
            taken.
    """
    bits = bitmask(packed)
    weight = memory(packed.shape, packed.values.dtype)
    put_kept(as_integers(packed.values), bits, as_integers(weight.view(-1)))
    return weight


def bitmask(packed: Packed) -> np.ndarray:
    """Bit mask of the kept weights of any encoding, uint8, (⌈out · in / 8⌉,).

    Bits beyond the last weight are 0.

    Raises:
        ValueError: sizes or counts do not fit together.
    """
    rows, columns = packed.shape
    weights = rows * columns
    if rows < 1 or columns < 1:
        raise ValueError(f"shape {packed.shape} is empty or negative")
    needed = places_bytes(packed.encoding, weights)
    if packed.places.dtype != torch.uint8 or packed.places.shape != (needed,):
        raise ValueError(f"{packed.places.numel()} bytes of places, {needed} are needed for shape {packed.shape}")
    codes = packed.encoding.group_codes
    if codes is None:
        bits = packed.places.numpy()
    elif columns % codes.m:
        raise ValueError(f"{packed.encoding} does not divide a row of {columns}")
    else:
        bits = codes.decode(packed.places.numpy(), weights)
    if weights % 8 and bits[-1] >> weights % 8:
        raise ValueError("bits beyond the last weight are set")
    count = count_bits(bits)
    if packed.values.shape != (count,):
        raise ValueError(f"{tuple(packed.values.shape)} values, {count} places")
    return bits


def places_bytes(encoding: Encoding, weights: int) -> int:
    """Bytes of the places of a number of weights."""
    codes = encoding.group_codes
    return -(-weights // 8) if codes is None else codes.places_bytes(weights)


def _size(encoding: Encoding, bits: np.ndarray, weights: int, columns: int, item: int) -> int | None:
    """Bytes of a weight with this bit mask in an encoding; None: a group keeps too many weights for it."""
    codes = encoding.group_codes
    if codes is None:
        return count_bits(bits) * item + places_bytes(encoding, weights)
    if columns % codes.m or not codes.fits(bits):
        return None
    return weights // codes.m * codes.n * item + places_bytes(encoding, weights)
