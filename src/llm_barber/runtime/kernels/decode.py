"""y = x · Wᵀ + bias for a few rows of x, with W packed by a bit mask and never unpacked into memory.

Decoding one token reads every weight once; reading sets its speed, and packed weights are fewer bytes. Equation, for
each output r and row t of x, with m the bits of W and v its kept values, both row after row:

    y[t, r] = Σ_c m[r, c] · v[k(r, c)] · x[t, c] + bias[r],   k(r, c) = number of set bits before bit r · in + c

Layout: bit i = r · in + c is bit i mod 8 of byte ⌊i / 8⌋. A program takes a few rows of W, one block of columns
after the other. `starts[r, b]` is k at the first column of block b, and a running sum over the block's bits gives k at
the other columns, so that no program waits for another. Products are summed in float32.

The kernel is tested in Triton's interpreter, on a CPU, only: it has not run on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 8  # rows of x, at most
PRODUCTS = 8  # rows of W times rows of x that a program takes


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8. Triton reads the annotations, too,
# and knows only its own.
@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    values, bits, starts, inputs, bias, outputs, tokens, rows, columns, blocks,
    width: tl.constexpr, height: tl.constexpr, together: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    token = tl.arange(0, together)
    sums = tl.zeros((height, together), dtype=tl.float32)
    for block in range(blocks):
        column = block * width + tl.arange(0, width)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        bit = row.to(tl.int64)[:, None] * columns + column[None, :]
        byte = tl.load(bits + (bit >> 3), mask=inside, other=0).to(tl.int32)
        kept = (byte >> (bit & 7).to(tl.int32)) & 1
        start = tl.load(starts + row.to(tl.int64) * blocks + block, mask=row < rows, other=0)
        number = start[:, None] + tl.cumsum(kept, axis=1) - kept
        weight = tl.load(values + number, mask=inside & (kept == 1), other=0.0).to(tl.float32)
        x = tl.load(
            inputs + token[None, :] * columns + column[:, None],
            mask=(token < tokens)[None, :] & (column < columns)[:, None],
            other=0.0,
        ).to(tl.float32)
        sums += tl.sum(weight[:, :, None] * x[None, :, :], axis=1)
    if has_bias:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(
        outputs + token[None, :] * rows + row[:, None],
        sums.to(outputs.dtype.element_ty),
        mask=(row < rows)[:, None] & (token < tokens)[None, :],
    )


def decode_product(
    values: Tensor, bits: Tensor, starts: Tensor, inputs: Tensor, bias: Tensor | None, block: int
) -> Tensor:
    """Compute inputs · Wᵀ + bias.

    Args:
        values: (kept,), float32, float16 or bfloat16.
        bits: uint8, (⌈out · in / 8⌉,).
        starts: int32 or int64, (out, ⌈in / block⌉), as `packed_linear.block_starts` makes them.
        inputs: (…, in), at most `MOST_ROWS` rows.
        bias: (out,), or None.
        block: columns of a block; a power of two.

    Returns:
        (…, out), in the dtype of the inputs.

    Raises:
        ValueError: there are more rows of inputs than `MOST_ROWS`.
    """
    columns, (rows, blocks) = inputs.shape[-1], starts.shape
    flat = inputs.reshape(-1, columns).contiguous()
    if len(flat) > MOST_ROWS:
        raise ValueError(f"{len(flat)} rows of inputs, this kernel takes at most {MOST_ROWS}")
    outputs = torch.empty(len(flat), rows, dtype=inputs.dtype, device=inputs.device)
    together = triton.next_power_of_2(max(len(flat), 1))
    height = PRODUCTS // together
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        _decode[(triton.cdiv(rows, height),)](
            values, bits, starts, flat, flat if bias is None else bias, outputs, len(flat), rows, columns, blocks,
            width=block, height=height, together=together, has_bias=bias is not None,
        )  # fmt: skip
    return outputs.view(*inputs.shape[:-1], rows)
