"""Y = X · Wᵀ + bias for 2 to 16 rows of X of 16 bits, with W packed by a bit mask, by the tensor cores.

The equation and the layout are those of `decode.py`. A program unpacks a tile of 16 rows of W, 128 columns at a time,
which never leaves the multiprocessor, and multiplies it with the rows of X, filled up to 16. A product of tensor cores
costs as much for 2 rows as for 16. Products are summed in float32. Inputs of float32 would be rounded by tensor cores:
`decode.py` multiplies them, row after row. int8 values are multiplied as they are, and the sums of a step by the scales
of its group, so that a step has no more columns than a group.

Tested in Triton's interpreter only, as `decode.py` is.
"""

import triton
import triton.language as tl

from llm_barber.runtime.kernels.decode import CHUNK, Division, divide_steps
from llm_barber.runtime.kernels.layout import WORD
from llm_barber.runtime.kernels.reading import find_chunk, take_tile

TOGETHER = 16  # rows of X, filled up
HEIGHT = 16  # rows of a tile
LANES = 16  # chunks of a tile's row
WARPS = 2


def divide_tiles(rows: int, columns: int, group: int) -> Division:
    """Divide a weight for `_decode_rows`.

    Example: 4096 rows of 4096 columns: 256 tiles of rows in 8 splits, of 4 steps each.

    Args:
        rows: of the weight.
        columns: of the weight.
        group: columns of a scale, or 0: as `can_decode` allows.
    """
    lanes = LANES if not group else min(LANES, group // CHUNK & -(group // CHUNK))
    steps = -(-columns // WORD) * (WORD // CHUNK) // lanes + (-(-columns // WORD) * (WORD // CHUNK) % lanes > 0)
    return Division(HEIGHT, lanes, *divide_steps(-(-rows // HEIGHT) * 32 * WARPS, steps))


@triton.jit  # type: ignore[untyped-decorator]
def _decode_rows(  # type: ignore[no-untyped-def]
    values, words, starts, row_starts, inputs, bias, scales, outputs, tokens, rows, row_words, groups, steps,
    height: tl.constexpr, lanes: tl.constexpr, together: tl.constexpr, group: tl.constexpr, has_bias: tl.constexpr,
    multiplied: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * height + tl.arange(0, height)
    row = tl.minimum(output, rows - 1)
    aside = tl.arange(0, lanes)
    values += tl.load(row_starts + row)[:, None]
    words += row[:, None] * row_words + aside[None, :]
    starts += row[:, None] * row_words + aside[None, :]
    split = tl.program_id(1)
    token = tl.arange(0, together)
    inputs += token[:, None] * row_words * 64
    sums = tl.zeros((together, height), dtype=tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        chunk = step * lanes + aside
        bits, first = find_chunk(values, words, starts, chunk, chunk < row_words * 8, aside)
        weight = take_tile(first, bits, height, lanes).to(multiplied)
        column = step * lanes * 8 + tl.arange(0, lanes * 8)
        inside = (token < tokens)[:, None] & (column < row_words * 64)[None, :]
        x = tl.load(inputs + column[None, :], mask=inside, other=0).to(multiplied)
        if group:
            scale = tl.load(scales + row * groups + tl.minimum(step * lanes * 8 // group, groups - 1)).to(tl.float32)
            sums += tl.dot(x, tl.trans(weight)) * scale[None, :]
        else:
            sums = tl.dot(x, tl.trans(weight), sums)
    if has_bias:
        sums += tl.load(bias + row).to(tl.float32)[None, :]
    outputs += (split * tokens + token)[:, None] * rows + output[None, :]
    tl.store(outputs, sums.to(outputs.dtype.element_ty), mask=(token < tokens)[:, None] & (output < rows)[None, :])
