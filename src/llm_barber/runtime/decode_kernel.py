"""y = x · Wᵀ + bias for few rows of x on a GPU, with W packed by a bit mask and never unpacked into memory.

Decoding a token reads every weight once; reading sets its speed, and packed weights are fewer bytes. With m the bits of
W and v its kept values, both row after row, each output r is

    y[r] = Σ_c m[r, c] · v[k(r, c)] · x[c] + bias[r],   k(r, c) = number of set bits before bit r · in + c

A lane takes a chunk of 8 columns: it counts the bits before the chunk in its word of 64, and goes on from there. int8
values are multiplied as they are, and each chunk's sum by the scale of its group. Sums are float32, in a fixed order.

The kernel is tested in Triton's interpreter; it has not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEIGHT = 4  # rows of a program: each input is loaded once for all of them
LANES = 128  # chunks that a program takes at once


@triton.jit  # type: ignore[untyped-decorator]
def _count_bits(word):  # type: ignore[no-untyped-def]
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int64)


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8. Triton reads the annotations, too,
# and knows only its own.
@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    values, words, starts, inputs, bias, scales, outputs, rows, row_words, groups,
    height: tl.constexpr, lanes: tl.constexpr, group: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * height + tl.arange(0, height)
    row = tl.minimum(output, rows - 1).to(tl.int64)
    token = tl.program_id(1)
    sums = tl.zeros((height, lanes), dtype=tl.float32)
    for step in range(tl.cdiv(row_words * 8, lanes)):
        chunk = step * lanes + tl.arange(0, lanes)
        inside = chunk < row_words * 8
        word_place = row[:, None] * row_words + (chunk // 8)[None, :]
        word = tl.load(words + word_place, mask=inside[None, :], other=0).to(tl.uint64, bitcast=True)
        shift = ((chunk % 8) * 8).to(tl.uint64)[None, :]
        below = word & ((tl.full(shift.shape, 1, tl.uint64) << shift) - 1)
        place = tl.load(starts + word_place, mask=inside[None, :], other=0).to(tl.int64) + _count_bits(below)
        bits = (word >> shift).to(tl.int32)
        chunks = tl.zeros((height, lanes), dtype=tl.float32)
        for column in tl.static_range(8):
            kept = (bits >> column) & 1
            weight = tl.load(values + place, mask=kept != 0, other=0).to(tl.float32)
            x = tl.load(inputs + token * row_words * 64 + chunk * 8 + column, mask=inside, other=0).to(tl.float32)
            chunks += weight * x[None, :]
            place += kept
        if group:
            scale = scales + row[:, None] * groups + tl.minimum(chunk * 8 // group, groups - 1)[None, :]
            chunks = chunks * tl.load(scale, mask=inside[None, :], other=0).to(tl.float32)
        sums += chunks
    total = tl.sum(sums, axis=1)
    if has_bias:
        total += tl.load(bias + row).to(tl.float32)
    tl.store(outputs + token * rows + output, total.to(outputs.dtype.element_ty), mask=output < rows)


def decode_product(
    values: Tensor, words: Tensor, starts: Tensor, inputs: Tensor, bias: Tensor | None, scales: Tensor | None,
    group: int,
) -> Tensor:  # fmt: skip
    """Compute inputs · Wᵀ + bias, (…, out), in the dtype of the inputs.

    Args:
        values: (kept,), float32, float16 or bfloat16; int8 with scales.
        words: int64, (out, in / 64): the bits of a row, 64 columns each.
        starts: int64, (out, in / 64): number of values before each word.
        inputs: (…, in).
        bias: (out,), or None.
        scales: bfloat16, (out, ⌈in / group⌉), or None.
        group: columns of a scale, a multiple of 8; 0 without scales.
    """
    rows, row_words = words.shape
    flat = inputs.reshape(-1, row_words * 64).contiguous()
    outputs = torch.empty(len(flat), rows, dtype=inputs.dtype, device=inputs.device)
    groups = 0 if scales is None else scales.shape[1]
    # A launch goes to the current device, whatever the tensors' device is. A kernel does not read what it has not.
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        _decode[(triton.cdiv(rows, HEIGHT), len(flat))](
            values, words, starts, flat, values if bias is None else bias, values if scales is None else scales,
            outputs, rows, row_words, groups, height=HEIGHT, lanes=LANES, group=group, has_bias=bias is not None,
        )  # fmt: skip
    return outputs.view(*inputs.shape[:-1], rows)
