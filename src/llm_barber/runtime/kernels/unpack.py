"""A packed weight made dense on a GPU, in one pass: for products with many rows of inputs, as when a prompt is read.

    W[r, c] = v[k(r, c)] where bit r · in + c is set, else 0; k(r, c) = number of set bits before it

Layout and lanes are those of `decode.py`. Values are copied, not computed: the weight is the packed one's, bit for bit.
int8 values are multiplied by the scales of their groups, as `rounding.restore_rows` does, bit for bit, too.

Tested in Triton's interpreter only, as `decode.py` is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_barber.runtime.kernels.reading import as_float32, find_chunk, take_tile

HEIGHT = 8  # rows of a program: each of its 4 warps takes 2, so that no warp waits for another
LANES = 32  # chunks of a program's rows


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8.
@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    values, words, starts, row_starts, scales, weight, rows, columns, row_words, groups, largest,
    height: tl.constexpr, lanes: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    inside_row = tl.minimum(row, rows - 1)
    values += tl.load(row_starts + inside_row)[:, None]
    aside = tl.arange(0, lanes)
    chunk = tl.program_id(1) * lanes + aside
    offset = inside_row[:, None] * row_words + aside[None, :]
    bits, first = find_chunk(values, words + offset, starts + offset, chunk, chunk < row_words * 8, aside)
    column = tl.program_id(1) * lanes * 8 + tl.arange(0, lanes * 8)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = take_tile(first, bits, height, lanes)
    if group:
        scale = tl.load(scales + inside_row[:, None] * groups + (column // group)[None, :], mask=inside, other=0)
        product = as_float32(tile) * scale.to(tl.float32)
        # Rounding of what float16 cannot hold gives -0.0, which would count as a weight that is kept.
        tile = tl.minimum(tl.maximum(product, -largest), largest).to(weight.dtype.element_ty) + 0.0
    tl.store(weight + row.to(tl.int64)[:, None] * columns + column[None, :], tile, mask=inside)


def unpack(
    values: Tensor, words: Tensor, starts: Tensor, row_starts: Tensor, scales: Tensor | None, group: int,
    columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Unpack a weight, (out, in).

    Args:
        values: (kept,), of `dtype`; int8 with scales.
        words: as `layout.Places`, like starts and row_starts.
        starts: number of the row's values before each word.
        row_starts: number of values before each row.
        scales: bfloat16, (out, ⌈in / group⌉), or None.
        group: columns of a scale; 0 without scales.
        columns: in.
        dtype: of the weight.
    """
    rows, row_words = words.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=values.device)
    groups, largest = (0, 0.0) if scales is None else (scales.shape[1], torch.finfo(dtype).max)
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        _unpack[(triton.cdiv(rows, HEIGHT), triton.cdiv(row_words * 8, LANES))](
            values, words, starts, row_starts, values if scales is None else scales, weight, rows, columns, row_words,
            groups, largest, height=HEIGHT, lanes=LANES, group=group,
        )  # fmt: skip
    return weight
