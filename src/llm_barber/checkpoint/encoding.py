"""Pack a pruned weight into fewer bytes: its kept values and their places.

Bit for bit, for every float dtype.

`bitmask`: one bit a weight, set where the weight is kept. `2:4` and `4:8`: every group of M consecutive weights keeps
exactly N (a group with fewer keeps zeros, too), and a code says which: 3 bits for the 6 ways to keep 2 of 4, 7 bits for
the 70 ways to keep 4 of 8. A weight is kept if it is not +0.0. docs/reference/packed-format.md describes the encoding
for other readers.
"""

import itertools
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import torch
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.bits import as_integers, count_bits, find_kept, put_kept, take_kept

CHECKED_TOGETHER = 1 << 14  # bytes of a bit mask
CODES_TOGETHER = 8  # eight codes fill a whole number of bytes, whatever their bits


class Encoding(StrEnum):
    """Encoding of the places of the kept values."""

    BITMASK = "bitmask"
    TWO_OF_FOUR = "2:4"
    FOUR_OF_EIGHT = "4:8"

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of the groups; None: the encoding has no groups."""
        if self is Encoding.BITMASK:
            return None
        n, m = self.value.split(":")
        return int(n), int(m)


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
    if encoding.group is None:
        return bits, bits
    places = _pack_codes(bits, encoding)[: places_bytes(encoding, weights)]
    if count_bits(bits) < weights // encoding.group[1] * encoding.group[0]:
        bits = _tables(encoding).filled.take(bits)
    return places, bits


def unpack(packed: Packed, into: Tensor | None = None) -> Tensor:
    """Unpack a weight, (out, in).

    Args:
        packed: the packed weight, maybe from a hostile file.
        into: contiguous memory for the weight, (out · in,), of its dtype; None: new memory.

    Raises:
        ValueError: sizes or counts do not fit together. They are checked before memory of the declared size is
            allocated.
    """
    bits = bitmask(packed)
    rows, columns = packed.shape
    weight = torch.empty(rows * columns, dtype=packed.values.dtype, device="cpu") if into is None else into
    put_kept(as_integers(packed.values), bits, as_integers(weight))
    return weight.view(rows, columns)


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
    if packed.encoding.group is None:
        bits = packed.places.numpy()
    elif columns % packed.encoding.group[1]:
        raise ValueError(f"{packed.encoding} does not divide a row of {columns}")
    else:
        bits = _unpack_codes(packed.places.numpy(), packed.encoding, weights)
    if weights % 8 and bits[-1] >> weights % 8:
        raise ValueError("bits beyond the last weight are set")
    count = count_bits(bits)
    if packed.values.shape != (count,):
        raise ValueError(f"{tuple(packed.values.shape)} values, {count} places")
    return bits


def places_bytes(encoding: Encoding, weights: int) -> int:
    """Bytes of the places of a number of weights."""
    if encoding.group is None:
        return -(-weights // 8)
    return -(-(weights // encoding.group[1]) // CODES_TOGETHER) * _tables(encoding).width


def _size(encoding: Encoding, bits: np.ndarray, weights: int, columns: int, item: int) -> int | None:
    """Bytes of a weight with this bit mask in an encoding; None: a group keeps too many weights for it."""
    if encoding.group is None:
        return count_bits(bits) * item + places_bytes(encoding, weights)
    n, m = encoding.group
    if columns % m:
        return None
    fits = _tables(encoding).fits
    for start in range(0, len(bits), CHECKED_TOGETHER):  # a weight that does not fit usually shows it soon
        if not fits.take(bits[start : start + CHECKED_TOGETHER]).all():
            return None
    return weights // m * n * item + places_bytes(encoding, weights)


@dataclass(frozen=True)
class Tables:
    """Look-up tables of an encoding by groups, from a byte of the bit mask to codes and back.

    A byte has one group (M = 8) or two (M = 4). By byte, (256,): `fits`, bool, no group keeps more than N; `codes`,
    uint8, the codes of the groups, the first in the lowest bits, each of the first way that keeps at least the group's
    weights; `filled`, uint8, the byte that the codes stand for, with exactly N bits in each group. By codes: `bytes`,
    uint8, that byte; `valid`, bool, the codes exist. `width`: bits of a code. `ways`: number of codes.
    """

    width: int
    ways: int
    fits: np.ndarray
    codes: np.ndarray
    filled: np.ndarray
    bytes: np.ndarray
    valid: np.ndarray


@cache
def _tables(encoding: Encoding) -> Tables:
    assert encoding.group is not None
    n, m = encoding.group
    # The weights that each code keeps, bit i for weight i; in lexicographic order.
    ways = [sum(1 << weight for weight in way) for way in itertools.combinations(range(m), n)]
    width = (len(ways) - 1).bit_length()
    groups = 8 // m
    fits, valid = np.ones(256, dtype=bool), np.ones(1 << width * groups, dtype=bool)
    codes, filled, masks = (np.zeros(length, dtype=np.uint8) for length in (256, 256, len(valid)))
    for byte in range(256):
        for group in range(groups):
            number = byte >> m * group & (1 << m) - 1
            code = next((code for code, way in enumerate(ways) if way & number == number), None)
            if code is None:
                fits[byte] = False
            else:
                codes[byte] |= code << width * group
                filled[byte] |= ways[code] << m * group
    for together in range(len(valid)):
        for group in range(groups):
            code = together >> width * group & (1 << width) - 1
            if code < len(ways):
                masks[together] |= ways[code] << m * group
            else:
                valid[together] = False
        if not valid[together]:
            masks[together] = 0
    return Tables(width, len(ways), fits, codes, filled, masks, valid)


def _pack_codes(bits: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Codes of a bit mask, uint8.

    Eight codes of b bits are in b bytes, the first in the lowest bits of the first byte.
    """
    layout = width, together, code_bits = _layout(encoding)
    table = _tables(encoding).codes
    padded = np.zeros((-(-len(bits) // together), together), dtype=np.uint8)  # code 0 has no weights
    padded.reshape(-1)[: len(bits)] = bits
    if native.usable():
        places = np.empty(len(padded) * width, dtype=np.uint8)
        native.join(padded.reshape(-1), table, layout, places)
        return places
    numbers = np.zeros(len(padded), dtype="<u8")
    for index in range(together):
        numbers |= table.take(padded[:, index]).astype("<u8") << np.uint64(code_bits * index)
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 8)[:, :width]).reshape(-1)


def _unpack_codes(places: np.ndarray, encoding: Encoding, weights: int) -> np.ndarray:
    """Bit mask of codes, uint8, (⌈weights / 8⌉,).

    Raises:
        ValueError: a code does not exist, or codes beyond the last group are set.
    """
    assert encoding.group is not None
    layout = width, together, bits = _layout(encoding)
    tables, groups = _tables(encoding), weights // encoding.group[1]
    if int.from_bytes(places[-width:].tobytes(), "little") >> width * ((groups - 1) % CODES_TOGETHER + 1):
        raise ValueError("codes beyond the last group are set")
    if native.usable():
        mask = np.empty(len(places) // width * together, dtype=np.uint8)
        native.split(places, tables.bytes, layout, mask)
        bad = not mask.all()  # a byte with a code that does not exist is 0; every other byte has kept weights
    else:
        bad = True
    if bad:
        codes = _codes(places, layout)
        if not tables.valid.take(codes).all():
            parts = [codes >> shift & (1 << tables.width) - 1 for shift in range(0, bits, tables.width)]
            raise ValueError(f"code {max(int(np.max(part)) for part in parts)} is not one of {tables.ways}")
        mask = tables.bytes.take(codes)
    mask = mask[: -(-weights // 8)]
    if weights % 8:
        mask[-1] &= (1 << weights % 8) - 1  # the code beyond the last group is 0, which stands for kept weights, too
    return mask


def _codes(places: np.ndarray, layout: tuple[int, int, int]) -> np.ndarray:
    """The codes of each byte of the bit mask, uint8, (bytes,)."""
    width, together, bits = layout
    wide = np.zeros((len(places) // width, 8), dtype=np.uint8)
    wide[:, :width] = places.reshape(-1, width)
    numbers = wide.view("<u8").reshape(-1)
    codes = np.empty((len(numbers), together), dtype=np.uint8)
    for index in range(together):
        codes[:, index] = numbers >> np.uint64(bits * index) & np.uint64((1 << bits) - 1)
    return codes.reshape(-1)


def _layout(encoding: Encoding) -> tuple[int, int, int]:
    """Bytes that codes take together; bytes of the bit mask that they stand for; bits of codes for one such byte."""
    assert encoding.group is not None
    width, bits_together = _tables(encoding).width, CODES_TOGETHER * encoding.group[1]
    return width, bits_together // 8, width * 8 // encoding.group[1]
