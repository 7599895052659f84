"""Pack a pruned weight into fewer bytes: its kept values and their places.

A weight of any float dtype comes back bit for bit.

`bitmask`: one bit a weight, set where the weight is kept. `2:4` and `4:8`: every group of M consecutive weights keeps
exactly N (a group with fewer keeps zeros, too), and a code says which. The N-subsets of {0, …, M − 1} are numbered from
0 in lexicographic order: 3 bits for the 6 ways to keep 2 of 4, 7 bits for the 70 ways to keep 4 of 8. A weight is kept
if it is not +0.0. docs/reference/packed-format.md describes the bytes for other readers.
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
from llm_barber.checkpoint.memory import Memory, ordinary_memory

FIRST = 1 << 14  # bytes of a bit mask that are looked at first
CODES_TOGETHER = 8  # eight codes fill a whole number of bytes, whatever their bits


@dataclass(frozen=True)
class GroupCodes:
    """Codes of the groups of M weights with N values, as look-up tables by a byte of the bit mask and back.

    A byte of the mask has one group (M = 8) or two (M = 4).

    Attributes:
        width: bits of a code.
        codes: uint8, (256,), by byte: the codes of its groups, the first group's in the lowest bits. A group that keeps
            fewer than N has the first code whose way keeps all of its weights.
        filled: uint8, (256,), by byte: the byte that its codes stand for, with exactly N bits in each group.
        fits: bool, (256,), by byte: no group keeps more than N.
        bytes: uint8, by codes: the byte that they stand for; 0 where a code does not exist.
    """

    n: int
    m: int
    width: int
    codes: np.ndarray
    filled: np.ndarray
    fits: np.ndarray
    bytes: np.ndarray

    @property
    def layout(self) -> tuple[int, int, int]:
        """Bytes of eight codes; bytes of the bit mask that they stand for; bits of the codes of one such byte."""
        return self.width, self.m, self.width * 8 // self.m

    def places_bytes(self, weights: int) -> int:
        """Bytes of the codes of a number of weights."""
        return -(-(weights // self.m) // CODES_TOGETHER) * self.width

    def encode(self, bits: np.ndarray, weights: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode a bit mask that fits.

        Args:
            bits: uint8, (⌈weights / 8⌉,).
            weights: number of weights.

        Returns:
            The codes, uint8, (bytes,): eight codes of b bits are in b bytes, the first in the lowest bits of the first
            byte. The bit mask of the weights with a value: groups that keep fewer than N have N.
        """
        width, together, code_bits = self.layout
        padded = np.zeros(-(-len(bits) // together) * together, dtype=np.uint8)  # code 0 has no weights
        padded[: len(bits)] = bits
        if native.usable():
            places = np.empty(len(padded) // together * width, dtype=np.uint8)
            native.join(padded, self.codes, self.layout, places)
        else:
            codes = np.unpackbits(self.codes.take(padded)[:, None], axis=1, count=code_bits, bitorder="little")
            places = np.packbits(codes, bitorder="little")
        if count_bits(bits) < weights // self.m * self.n:
            bits = self.filled.take(bits)
        return places[: self.places_bytes(weights)], bits

    def decode(self, places: np.ndarray, weights: int) -> np.ndarray:
        """Bit mask of codes, uint8, (⌈weights / 8⌉,).

        Raises:
            ValueError: a code does not exist, or codes beyond the last group are set.
        """
        width, together, code_bits = self.layout
        last = (weights // self.m - 1) % CODES_TOGETHER + 1  # groups of the last eight codes
        if int.from_bytes(places[-width:].tobytes(), "little") >> width * last:
            raise ValueError("codes beyond the last group are set")
        if native.usable():
            mask = np.empty(len(places) // width * together, dtype=np.uint8)
            native.split(places, self.bytes, self.layout, mask)
        else:
            codes = np.unpackbits(places, bitorder="little").reshape(-1, code_bits)
            mask = self.bytes.take(np.packbits(codes, axis=1, bitorder="little")[:, 0])
        if not mask.all():
            raise ValueError(f"a code of a group of {self.m} does not exist")
        mask = mask[: -(-weights // 8)]
        if weights % 8:
            mask[-1] &= (1 << weights % 8) - 1  # the code beyond the last group is 0, and stands for kept weights
        return mask


@cache
def group_codes(n: int, m: int) -> GroupCodes:
    """Make the codes of groups of M = 4 or 8 weights with N values."""
    ways = [sum(1 << weight for weight in way) for way in itertools.combinations(range(m), n)]
    width, groups = (len(ways) - 1).bit_length(), range(8 // m)
    masks = np.zeros(1 << width * len(groups), dtype=np.uint8)
    codes, filled = np.zeros(256, dtype=np.uint8), np.zeros(256, dtype=np.uint8)
    for chosen in itertools.product(range(len(ways)), repeat=len(groups)):
        masks[sum(chosen[group] << width * group for group in groups)] = sum(
            ways[chosen[group]] << m * group for group in groups
        )
    for byte in range(256):
        kept = [byte >> m * group & (1 << m) - 1 for group in groups]
        first = [next((code for code, way in enumerate(ways) if way & part == part), None) for part in kept]
        if None not in first:
            codes[byte] = sum((code or 0) << width * group for group, code in enumerate(first))
            filled[byte] = masks[codes[byte]]
    return GroupCodes(n, m, width, codes, filled, filled & np.arange(256) == np.arange(256), masks)


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
    smallest = count_bits(bits) * item + places_bytes(Encoding.BITMASK, weights), Encoding.BITMASK
    for encoding in (Encoding.TWO_OF_FOUR, Encoding.FOUR_OF_EIGHT):
        codes = encoding.group_codes
        if codes is None or columns % codes.m or not codes.fits.take(bits[:FIRST]).all():
            continue  # a weight that does not fit shows it soon
        if codes.fits.take(bits).all():
            size = weights // codes.m * codes.n * item + codes.places_bytes(weights)
            return min(smallest, (size, encoding))  # a weight that fits 2:4 fits 4:8, too, in more bytes
    return smallest


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
