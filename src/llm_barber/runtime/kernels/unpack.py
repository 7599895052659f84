"""A packed weight made dense on a GPU, in one pass: for products with many rows of inputs, as when a prompt is read.

    W[r, c] = v[k(r, c)] where bit r · in + c is set, else 0; k(r, c) = number of set bits before it

Layout and starts are those of `decode.py`: a program takes a few rows of one block of columns, and `starts` tells it
the first value of each row. Values are copied, not computed: the weight is the packed one's, bit for bit.

Compiled for compute capability 8.0 to 9.0 it takes 25 to 26 instructions a weight, no barrier, and stores 16 bytes at
once. It is tested in Triton's interpreter, on a CPU, only: it has not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # rows of a program: a warp takes a row of a block, so that no warp waits for another


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    values, bits, starts, weight, rows, columns, width: tl.constexpr, height: tl.constexpr
):
    row = tl.program_id(0) * height + tl.arange(0, height)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    column = block * width + tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    bit = row.to(tl.int64)[:, None] * columns + column[None, :]
    byte = tl.load(bits + (bit >> 3), mask=inside, other=0).to(tl.int32)
    kept = (byte >> (bit & 7).to(tl.int32)) & 1
    start = tl.load(starts + row.to(tl.int64) * blocks + block, mask=row < rows, other=0)
    number = start[:, None] + tl.cumsum(kept, axis=1) - kept
    tl.store(weight + bit, tl.load(values + number, mask=inside & (kept == 1), other=0), mask=inside)


def unpack(values: Tensor, bits: Tensor, starts: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """Unpack a weight, (out, in), in the dtype of its values.

    Args:
        values: (kept,).
        bits: uint8, (⌈out · in / 8⌉,).
        starts: int32 or int64, (out, ⌈in / block⌉), as `packed_linear.block_starts` makes them.
        shape: out, in.
        block: columns of a block; a power of two.
    """
    rows, columns = shape
    weight = torch.empty(shape, dtype=values.dtype, device=values.device)
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        _unpack[(triton.cdiv(rows, ROWS), starts.shape[1])](
            values, bits, starts, weight, rows, columns, width=block, height=ROWS
        )
    return weight
