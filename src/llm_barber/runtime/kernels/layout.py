"""Places of kept weights as the kernels read them: words of bits, and the number of values before each word."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.checkpoint.bits import POPCOUNT

# Most rows of inputs that the decode kernels take: tensor cores multiply 16 rows of 16 bits at once; rows of float32,
# which tensor cores would round, are multiplied each by itself.
DECODE_ROWS = {torch.float32: 4, torch.float16: 16, torch.bfloat16: 16}
WORD = 64  # columns of a word
MOST_COLUMNS = 1 << 16  # of a row whose starts fit uint16


@dataclass(frozen=True)
class Places:
    """Places of a weight's kept values, (out, in), on the weight's device.

    The value of row r and column c has the number row_starts[r] + starts[r, ⌊c / 64⌋] + the set bits of
    words[r, ⌊c / 64⌋] below bit c mod 64.

    Example, if a word had 4 columns: the rows 101001 and 011000 have words [[0b0101, 0b10], [0b0110, 0]], starts
    [[0, 2], [0, 2]] and row_starts [0, 3].

    Attributes:
        bits: as packed; identifies the weight that the places are of.
        words: int64, (out, ⌈in / 64⌉): each row begins with a word of its own, and bits behind its end are 0.
        starts: uint16, (out, ⌈in / 64⌉), number of the row's values before each word; int32 for very long rows.
        row_starts: int64, (out,), number of values before each row.
    """

    bits: Tensor
    words: Tensor
    starts: Tensor
    row_starts: Tensor


def find_places(bits: Tensor, shape: tuple[int, int]) -> Places:
    """Words and starts of a weight, on the device of its bits.

    Args:
        bits: uint8, (⌈out · in / 8⌉,), row after row, the first column in the lowest bit.
        shape: out, in.
    """
    rows, columns = shape
    words = row_bytes(bits, shape).view(torch.int64).view(rows, -(-columns // WORD))
    counts = torch.from_numpy(POPCOUNT).to(bits.device)[words.view(torch.uint8).int()]
    counts = counts.view(rows, -1, WORD // 8).sum(2, dtype=torch.int32)
    starts = counts.cumsum(1, dtype=torch.int32) - counts
    in_row = counts.sum(1, dtype=torch.int64)
    dtype = torch.uint16 if columns <= MOST_COLUMNS else torch.int32
    return Places(bits, words, starts.to(dtype), in_row.cumsum(0) - in_row)


def row_bytes(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bits with each row in whole words, uint8, (out · ⌈in / 64⌉ · 8,); `bits` itself where rows are so already."""
    rows, columns = shape
    words = -(-columns // WORD)
    if columns % WORD == 0 and bits.data_ptr() % 8 == 0:
        return bits
    first_bit = torch.arange(rows, device=bits.device)[:, None] * columns
    byte = (first_bit >> 3) + torch.arange(words * 8, device=bits.device)
    padded = torch.nn.functional.pad(bits, (0, 2))
    last = len(bits)  # of the two padding bytes, for all bytes behind the end
    low, high = padded[byte.clamp(max=last)].int(), padded[(byte + 1).clamp(max=last)].int()
    shifted = (low | high << 8) >> (first_bit & 7)
    counts = (columns - 8 * torch.arange(words * 8, device=bits.device)).clamp(0, 8)  # columns of each byte
    return (shifted & ((1 << counts) - 1)).to(torch.uint8).view(-1)
