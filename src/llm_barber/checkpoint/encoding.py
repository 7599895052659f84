"""A pruned weight in fewer bytes: its kept values, and where they go. Bit for bit, for every float dtype.

`bitmask`: one bit a weight says whether it is kept. `2:4` and `4:8`: every group of M consecutive weights keeps exactly
N (one that kept fewer keeps zeros, too), and a number says which: 3 bits for the 6 ways to keep 2 of 4, 7 bits for the
70 ways to keep 4 of 8. Kept is what is not +0.0. docs/packed-format.md has it for other readers.
"""

import itertools
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CODES_TOGETHER = 8  # so many codes fill a whole number of bytes


class Encoding(StrEnum):
    """How the places of the kept values are written."""

    BITMASK = "bitmask"
    TWO_OF_FOUR = "2:4"
    FOUR_OF_EIGHT = "4:8"

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M; None: it has no groups."""
        if self is Encoding.BITMASK:
            return None
        kept, of = self.value.split(":")
        return int(kept), int(of)


@dataclass(frozen=True)
class Packed:
    """`values`: the kept ones, row by row, (kept,). `places`: uint8, (bytes,), by `encoding`. `shape`: (out, in)."""

    shape: tuple[int, int]
    encoding: Encoding
    values: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of values and places."""
        return self.values.numel() * self.values.element_size() + self.places.numel()


def pack(weight: Tensor) -> Packed | None:
    """The encoding with the fewest bytes; None if none has fewer than the weight itself.

    Args:
        weight: (out, in), any dtype of 1, 2, 4 or 8 bytes, on the CPU.
    """
    rows, columns = weight.shape
    flat = weight.contiguous().view(-1).view(INTEGERS[weight.element_size()])
    kept = flat != 0
    best: tuple[int, Encoding] | None = None
    for encoding in Encoding:
        size = _size(encoding, kept, columns, flat.element_size())
        if size is not None and (best is None or size < best[0]):
            best = size, encoding
    if best is None or best[0] >= flat.numel() * flat.element_size():
        return None
    encoding = best[1]
    if encoding.group is None:
        places = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    else:
        codes = torch.from_numpy(_tables(encoding)[0])[_group_numbers(kept, encoding.group[1])]
        places = _pack_codes(codes, encoding)
        kept = torch.from_numpy(_tables(encoding)[1])[codes.long()].view(-1)
    return Packed((rows, columns), encoding, flat[kept].view(weight.dtype), places)


def unpack(packed: Packed, into: Tensor | None = None) -> Tensor:
    """The weight, (out, in).

    Args:
        packed: its parts.
        into: contiguous memory for it, (out · in,) of its dtype; None: new memory.

    Raises:
        ValueError: sizes or counts do not fit together; nothing of the declared size is allocated before they do.
    """
    rows, columns = packed.shape
    count = rows * columns
    if rows < 1 or columns < 1:
        raise ValueError(f"shape {packed.shape} is empty or negative")
    wanted = places_bytes(packed.encoding, count)
    if packed.places.dtype != torch.uint8 or packed.places.shape != (wanted,):
        raise ValueError(f"{packed.places.numel()} bytes of places, {wanted} are needed for shape {packed.shape}")
    if packed.encoding.group is None:
        bits = np.unpackbits(packed.places.numpy(), bitorder="little")
        if bits[count:].any():
            raise ValueError("bits beyond the last weight are set")
        kept = torch.from_numpy(bits[:count]).view(torch.bool)
    else:
        if columns % packed.encoding.group[1]:
            raise ValueError(f"{packed.encoding} does not divide a row of {columns}")
        masks = torch.from_numpy(_tables(packed.encoding)[1])
        codes = _unpack_codes(packed.places, packed.encoding, count // packed.encoding.group[1])
        if int(codes.max()) >= len(masks):
            raise ValueError(f"code {int(codes.max())} is not one of {len(masks)}")
        kept = masks[codes].view(-1)
    found = int(kept.count_nonzero())
    if packed.values.shape != (found,):
        raise ValueError(f"{tuple(packed.values.shape)} values, {found} places")
    values = packed.values.view(INTEGERS[packed.values.element_size()])
    weight = torch.empty(count, dtype=values.dtype) if into is None else into.view(values.dtype)
    weight.zero_().masked_scatter_(kept, values)
    return weight.view(packed.values.dtype).view(rows, columns)


def places_bytes(encoding: Encoding, weights: int) -> int:
    """Bytes that the places of so many weights take."""
    if encoding.group is None:
        return -(-weights // 8)
    return -(-(weights // encoding.group[1]) // CODES_TOGETHER) * _width(encoding)


def _size(encoding: Encoding, kept: Tensor, columns: int, item: int) -> int | None:
    """Bytes that an encoding takes; None if it cannot be had."""
    if encoding.group is None:
        return int(kept.count_nonzero()) * item + places_bytes(encoding, kept.numel())
    most, size = encoding.group
    if columns % size or int(kept.view(-1, size).sum(1, dtype=torch.uint8).max()) > most:
        return None
    return kept.numel() // size * most * item + places_bytes(encoding, kept.numel())


def _width(encoding: Encoding) -> int:
    """Bits of a code."""
    return (len(_tables(encoding)[1]) - 1).bit_length()


@cache
def _tables(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Group number (bit i: weight i is kept) → code of the first way that keeps these at least; code → bool (M,)."""
    assert encoding.group is not None
    kept, size = encoding.group
    ways = list(itertools.combinations(range(size), kept))  # in lexicographic order
    masks = np.zeros((len(ways), size), dtype=bool)
    for code, way in enumerate(ways):
        masks[code, list(way)] = True
    numbers = masks @ (1 << np.arange(size))
    codes = np.full(1 << size, 255, dtype=np.uint8)
    for number in range(1 << size):
        fitting = np.nonzero((numbers & number) == number)[0]
        if len(fitting):
            codes[number] = fitting[0]
    return codes, masks


def _group_numbers(kept: Tensor, size: int) -> Tensor:
    """int64, (groups,): bit i says whether the group's weight i is kept."""
    bits = np.packbits(kept.view(-1, size).numpy(), axis=1, bitorder="little")  # one byte a group
    return torch.from_numpy(bits[:, 0]).long()


def _pack_codes(codes: Tensor, encoding: Encoding) -> Tensor:
    """uint8: eight codes of b bits in b bytes, the first code in the lowest bits of the first byte."""
    width = _width(encoding)
    padded = torch.nn.functional.pad(codes.long(), (0, -len(codes) % CODES_TOGETHER)).view(-1, CODES_TOGETHER)
    together = (padded << (width * torch.arange(CODES_TOGETHER))).sum(1)
    return together.view(torch.uint8).view(-1, 8)[:, :width].reshape(-1).contiguous()


def _unpack_codes(places: Tensor, encoding: Encoding, count: int) -> Tensor:
    """int64, (count,).

    Raises:
        ValueError: codes beyond the last group are set.
    """
    width = _width(encoding)
    together = (
        torch.nn.functional.pad(places.view(-1, width), (0, 8 - width)).contiguous().view(torch.int64).view(-1, 1)
    )
    codes = ((together >> (width * torch.arange(CODES_TOGETHER))) & ((1 << width) - 1)).view(-1)
    if codes[count:].any():
        raise ValueError("codes beyond the last group are set")
    return codes[:count]
