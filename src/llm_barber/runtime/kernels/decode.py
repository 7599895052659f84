"""y = x · Wᵀ + bias for each row of x, with W packed by a bit mask and never unpacked into memory.

Decoding a token reads every weight once; reading sets its speed, and packed weights are fewer bytes. Equation, for each
output r, with m the bits of W and v its kept values, both row after row:

    y[r] = Σ_c m[r, c] · v[k(r, c)] · x[c] + bias[r],   k(r, c) = number of set bits before bit r · in + c

Layout: `layout.Places`. A lane takes chunks of 8 columns of a few rows. It loads a chunk's word of the mask, counts the
bits before the chunk, and then loads each kept value, so that no lane waits for another before the one sum of all lanes
at the end. Where a matrix has too few rows to fill a GPU, programs share the columns of a row, and a second kernel adds
their sums in a fixed order. int8 values are multiplied as they are, and each chunk's sum by the scale of its group.
Products are summed in float32: the same inputs give the same bits.

Beside bytes, instructions a weight decide the speed: docs/notebook/packed-speed.md counts them, a test checks it. The
kernel is tested in Triton's interpreter, on a CPU, and compiled for compute capability 8.0 to 9.0: it has not run on a
GPU yet. Related are MACKO (arXiv 2511.13061) and SpInfer (EuroSys 2025), whose formats differ.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from llm_barber.runtime.kernels.layout import WORD
from llm_barber.runtime.kernels.reading import as_float32, find_chunk, load_chunk, take_chunk

CHUNK = 8  # columns of a lane's chunk
LANES = (32, 64, 128)  # of a program, 32 a warp
HEIGHTS = (4, 2, 1)  # rows of a program: each input is loaded once for all of them
THREADS = 1 << 17  # that keep a large GPU busy: half of an H100's
STEPS_A_SPLIT = 4  # at least, so that a second kernel is worth its launch
ADDED = 256  # outputs of a program that adds the sums of splits


@dataclass(frozen=True)
class Division:
    """The division of a weight among programs.

    `height`: rows of a program. `lanes`: chunks that it takes at once. `splits`: programs that share a row's columns.
    `steps`: of each of them.
    """

    height: int
    lanes: int
    splits: int
    steps: int


def divide(rows: int, columns: int) -> Division:
    """Divide a weight for `_decode`.

    Example: 4096 rows of 4096 columns: 1024 programs of 4 rows, 4 steps of 128 chunks each.
    """
    chunks = -(-columns // WORD) * (WORD // CHUNK)
    fewest = min(-(-chunks // lanes) * lanes for lanes in LANES)
    lanes = max(lanes for lanes in LANES if -(-chunks // lanes) * lanes <= 1.1 * fewest)
    height = next((height for height in HEIGHTS if rows // height * lanes >= THREADS), 1)
    return Division(height, lanes, *divide_steps(-(-rows // height) * lanes, -(-chunks // lanes)))


def divide_steps(threads: int, steps: int) -> tuple[int, int]:
    """Number of splits and steps of each, so that few threads with many steps become more threads with fewer."""
    splits = 1
    while threads * splits < THREADS // 2 and steps // (2 * splits) >= STEPS_A_SPLIT:
        splits *= 2
    return splits, -(-steps // splits)


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8. Triton reads the annotations, too,
# and knows only its own.
@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    values, words, starts, row_starts, inputs, bias, scales, outputs, rows, row_words, groups, steps,
    height: tl.constexpr, lanes: tl.constexpr, group: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * height + tl.arange(0, height)
    row = tl.minimum(output, rows - 1)
    # A pointer that all lanes share is kept aside, and moved for each load: `aside` makes it the lane's own.
    aside = tl.arange(0, lanes)
    values += tl.load(row_starts + row)[:, None]
    words += row[:, None] * row_words + aside[None, :]
    starts += row[:, None] * row_words + aside[None, :]
    split, token = tl.program_id(1), tl.program_id(2)
    inputs += token * row_words * 64
    sums = tl.zeros((height, lanes), dtype=tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        chunk = step * lanes + aside
        inside = chunk < row_words * 8
        bits, first = find_chunk(values, words, starts, chunk, inside, aside)
        w0, w1, w2, w3, w4, w5, w6, w7 = take_chunk(first, bits)
        x0, x1, x2, x3, x4, x5, x6, x7 = load_chunk(inputs, chunk, inside, lanes)
        chunks = tl.zeros((height, lanes), dtype=tl.float32) if group else sums
        chunks = chunks + as_float32(w0) * x0[None, :] + as_float32(w1) * x1[None, :]
        chunks = chunks + as_float32(w2) * x2[None, :] + as_float32(w3) * x3[None, :]
        chunks = chunks + as_float32(w4) * x4[None, :] + as_float32(w5) * x5[None, :]
        chunks = chunks + as_float32(w6) * x6[None, :] + as_float32(w7) * x7[None, :]
        if group:
            scale = scales + row[:, None] * groups + tl.minimum(chunk * 8 // group, groups - 1)[None, :]
            sums += chunks * tl.load(scale, mask=inside[None, :], other=0).to(tl.float32)
        else:
            sums = chunks
    total = tl.sum(sums, axis=1)
    if has_bias:
        total += tl.load(bias + row).to(tl.float32)
    outputs += (split * tl.num_programs(2) + token) * rows
    tl.store(outputs + output, total.to(outputs.dtype.element_ty), mask=output < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _add_splits(parts, bias, outputs, count, rows, splits, width: tl.constexpr, has_bias: tl.constexpr):  # type: ignore[no-untyped-def]
    output = tl.program_id(0) * width + tl.arange(0, width)
    inside = output < count
    total = tl.zeros((width,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + output, mask=inside, other=0)
    if has_bias:
        total += tl.load(bias + output % rows, mask=inside, other=0).to(tl.float32)
    tl.store(outputs + output, total.to(outputs.dtype.element_ty), mask=inside)
