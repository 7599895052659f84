"""Codes of N:M groups: a code says which N of M consecutive weights have a value.

The N-subsets of {0, …, M − 1} are numbered from 0 in lexicographic order: 3 bits for the 6 ways to keep 2 of 4, 7 bits
for the 70 ways to keep 4 of 8. docs/reference/packed-format.md describes the bytes for other readers.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from llm_barber import native
from llm_barber.checkpoint.bits import count_bits

CODES_TOGETHER = 8  # eight codes fill a whole number of bytes, whatever their bits
CHECKED_TOGETHER = 1 << 14  # bytes of a bit mask


@dataclass(frozen=True)
class GroupCodes:
    """Codes of the groups of M weights with N values, as look-up tables by a byte of the bit mask and back.

    A byte of the mask has one group (M = 8) or two (M = 4). A code names a way to keep N weights of a group.

    Attributes:
        width: bits of a code.
        ways: number of codes.
        fitting: bool, (256,), by byte: no group keeps more than N.
        codes: uint8, (256,), by byte: the codes of its groups, the first group's in the lowest bits. A group that keeps
            fewer than N has the first code whose way keeps all of its weights.
        filled: uint8, (256,), by byte: the byte that its codes stand for, with exactly N bits in each group.
        bytes: uint8, by codes: the byte that they stand for.
        valid: bool, by codes: these codes exist.
    """

    n: int
    m: int
    width: int
    ways: int
    fitting: np.ndarray
    codes: np.ndarray
    filled: np.ndarray
    bytes: np.ndarray
    valid: np.ndarray

    @property
    def layout(self) -> tuple[int, int, int]:
        """Bytes of eight codes; bytes of the bit mask that they stand for; bits of the codes of one such byte."""
        return self.width, self.m, self.width * 8 // self.m

    def places_bytes(self, weights: int) -> int:
        """Bytes of the codes of a number of weights."""
        return -(-(weights // self.m) // CODES_TOGETHER) * self.width

    def fits(self, bits: np.ndarray) -> bool:
        """Tell whether no group of a bit mask, uint8, keeps more than N weights."""
        for start in range(0, len(bits), CHECKED_TOGETHER):  # a weight that does not fit usually shows it soon
            if not self.fitting.take(bits[start : start + CHECKED_TOGETHER]).all():
                return False
        return True

    def encode(self, bits: np.ndarray, weights: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode a bit mask that fits.

        Args:
            bits: uint8, (⌈weights / 8⌉,).
            weights: number of weights.

        Returns:
            The codes, uint8, (bytes,): eight codes of b bits are in b bytes, the first in the lowest bits of the first
            byte. The bit mask of the weights with a value: groups that keep fewer than N have N.
        """
        places = self._joined(bits)[: self.places_bytes(weights)]
        if count_bits(bits) < weights // self.m * self.n:
            bits = self.filled.take(bits)
        return places, bits

    def decode(self, places: np.ndarray, weights: int) -> np.ndarray:
        """Bit mask of codes, uint8, (⌈weights / 8⌉,).

        Raises:
            ValueError: a code does not exist, or codes beyond the last group are set.
        """
        width, bytes_together, bits = self.layout
        last = (weights // self.m - 1) % CODES_TOGETHER + 1  # groups of the last eight codes
        if int.from_bytes(places[-width:].tobytes(), "little") >> width * last:
            raise ValueError("codes beyond the last group are set")
        if native.usable():
            mask = np.empty(len(places) // width * bytes_together, dtype=np.uint8)
            native.split(places, self.bytes, self.layout, mask)
            bad = not mask.all()  # a byte with a code that does not exist is 0; every other byte has kept weights
        else:
            bad = True
        if bad:
            codes = self._split(places)
            if not self.valid.take(codes).all():
                parts = [codes >> shift & (1 << width) - 1 for shift in range(0, bits, width)]
                raise ValueError(f"code {max(int(np.max(part)) for part in parts)} is not one of {self.ways}")
            mask = self.bytes.take(codes)
        mask = mask[: -(-weights // 8)]
        if weights % 8:
            mask[-1] &= (1 << weights % 8) - 1  # the code beyond the last group is 0, and stands for kept weights
        return mask

    def _joined(self, bits: np.ndarray) -> np.ndarray:
        """Codes of a bit mask, uint8, whole groups of eight."""
        width, bytes_together, code_bits = self.layout
        padded = np.zeros((-(-len(bits) // bytes_together), bytes_together), dtype=np.uint8)  # code 0 has no weights
        padded.reshape(-1)[: len(bits)] = bits
        if native.usable():
            places = np.empty(len(padded) * width, dtype=np.uint8)
            native.join(padded.reshape(-1), self.codes, self.layout, places)
            return places
        numbers = np.zeros(len(padded), dtype="<u8")
        for index in range(bytes_together):
            numbers |= self.codes.take(padded[:, index]).astype("<u8") << np.uint64(code_bits * index)
        return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 8)[:, :width]).reshape(-1)

    def _split(self, places: np.ndarray) -> np.ndarray:
        """The codes of each byte of the bit mask, uint8, (bytes,)."""
        width, bytes_together, bits = self.layout
        wide = np.zeros((len(places) // width, 8), dtype=np.uint8)
        wide[:, :width] = places.reshape(-1, width)
        numbers = wide.view("<u8").reshape(-1)
        codes = np.empty((len(numbers), bytes_together), dtype=np.uint8)
        for index in range(bytes_together):
            codes[:, index] = numbers >> np.uint64(bits * index) & np.uint64((1 << bits) - 1)
        return codes.reshape(-1)


@cache
def group_codes(n: int, m: int) -> GroupCodes:
    """Make the codes of groups of M = 4 or 8 weights with N values."""
    # The weights that each code keeps, bit i for weight i; in lexicographic order.
    ways = [sum(1 << weight for weight in way) for way in itertools.combinations(range(m), n)]
    width = (len(ways) - 1).bit_length()
    groups = 8 // m
    fitting, valid = np.ones(256, dtype=bool), np.ones(1 << width * groups, dtype=bool)
    codes, filled, masks = (np.zeros(length, dtype=np.uint8) for length in (256, 256, len(valid)))
    for byte in range(256):
        for group in range(groups):
            number = byte >> m * group & (1 << m) - 1
            code = next((code for code, way in enumerate(ways) if way & number == number), None)
            if code is None:
                fitting[byte] = False
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
    return GroupCodes(n, m, width, len(ways), fitting, codes, filled, masks, valid)
