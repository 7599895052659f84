"""Launch the kernels that multiply a few rows of inputs with a packed weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from llm_barber.runtime.kernels import decode, decode_rows
from llm_barber.runtime.kernels.layout import DECODE_ROWS, WORD
from llm_barber.runtime.kernels.reading import as_float32

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
OPTIONS = {"enable_fp_fusion": True}  # one rounding of a product and its sum, which costs one instruction
ALIGNMENT = 16  # bytes of the widest load
INTERPRETED = not isinstance(as_float32, triton.JITFunction)  # the interpreter multiplies no matrices of bfloat16


def decode_product(
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    row_starts: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    group: int,
) -> Tensor:
    """Compute inputs · Wᵀ + bias.

    Args:
        values: (kept,), float32, float16 or bfloat16; int8 with scales.
        words: as `layout.Places`, like starts and row_starts.
        starts: number of the row's values before each word.
        row_starts: number of values before each row.
        inputs: (…, in), at least 1 row and at most `DECODE_ROWS`.
        bias: (out,), or None.
        scales: bfloat16, (out, ⌈in / group⌉), or None.
        group: columns of a scale; 0 without scales.

    Returns:
        (…, out), in the dtype of the inputs.

    Raises:
        ValueError: there are no rows of inputs, or more than the kernels take.
    """
    (rows, row_words), columns = words.shape, inputs.shape[-1]
    flat = _padded(inputs.reshape(-1, columns), row_words * WORD)
    tokens = len(flat)
    if not 1 <= tokens <= DECODE_ROWS[inputs.dtype]:
        raise ValueError(f"{tokens} rows of inputs, the kernels take 1 to {DECODE_ROWS[inputs.dtype]}")
    if scales is not None and group >= columns:
        group = row_words * WORD  # one group
    by_row = tokens == 1 or inputs.dtype == torch.float32
    divided = decode.divide(rows, columns) if by_row else decode_rows.divide_tiles(rows, columns, group)
    outputs = torch.empty(tokens, rows, dtype=inputs.dtype, device=inputs.device)
    parts = outputs
    if divided.splits > 1:
        parts = torch.empty(divided.splits, tokens, rows, dtype=torch.float32, device=inputs.device)
    tensors = values, words, starts, row_starts, flat, _or_any(bias, flat), _or_any(scales, flat), parts
    sizes = rows, row_words, 0 if scales is None else scales.shape[1], divided.steps
    named = {"height": divided.height, "lanes": divided.lanes, "group": group, **OPTIONS}
    named["has_bias"] = bias is not None and divided.splits == 1
    grid = triton.cdiv(rows, divided.height), divided.splits
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        if by_row:
            decode._decode[(*grid, tokens)](*tensors, *sizes, **named, num_warps=divided.lanes // 32)
        else:
            multiplied = tl.float32 if INTERPRETED else TYPES[inputs.dtype]
            named |= {"together": decode_rows.TOGETHER, "multiplied": multiplied, "num_warps": decode_rows.WARPS}
            decode_rows._decode_rows[grid](*tensors, tokens, *sizes, **named)
        if divided.splits > 1:
            decode._add_splits[(triton.cdiv(tokens * rows, decode.ADDED),)](
                parts, _or_any(bias, flat), outputs, tokens * rows, rows, divided.splits, width=decode.ADDED,
                has_bias=bias is not None,
            )  # fmt: skip
    return outputs.view(*inputs.shape[:-1], rows)


def _or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Argument for a kernel that reads it only where it is not None."""
    return other if tensor is None else tensor


def _padded(inputs: Tensor, width: int) -> Tensor:
    """Rows of inputs, (rows, in), filled with zeros to (rows, width), where wide loads can read them."""
    if inputs.shape[1] < width:
        return pad(inputs, (0, width - inputs.shape[1]))
    inputs = inputs.contiguous()
    return inputs if inputs.data_ptr() % ALIGNMENT == 0 else inputs.clone()
