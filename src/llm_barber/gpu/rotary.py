"""Rotary embeddings, and their gradient, in one pass over a GPU's memory.

    y₁ = x₁ · cos₁ − x₂ · sin₁,  y₂ = x₂ · cos₂ + x₁ · sin₂

x₁ and x₂ are the halves of a head. Each product is rounded to the dtype, as PyTorch does that computes them one by
one, so that results are the same bits.

Tested in Triton's interpreter only, and on each GPU before it is used there (`kernels.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # heads of a token that a program rotates


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8.
@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    states, cosine, sine, rotated, heads, tokens, half,
    sequence_step, head_step, token_step, rotated_sequence, rotated_head, rotated_token, angle_sequence, angle_token,
    back: tl.constexpr, together: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    sequence, position = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    head = (tl.program_id(1) * together + tl.arange(0, together)).to(tl.int64)
    feature = tl.arange(0, width)
    inside = (head < heads)[:, None] & (feature < half)[None, :]
    angle = sequence * angle_sequence + position * angle_token + feature
    known = feature < half
    cosine_1, cosine_2 = tl.load(cosine + angle, mask=known), tl.load(cosine + angle + half, mask=known)
    sine_1, sine_2 = tl.load(sine + angle, mask=known), tl.load(sine + angle + half, mask=known)
    place = sequence * sequence_step + position * token_step + head[:, None] * head_step + feature[None, :]
    first = tl.load(states + place, mask=inside).to(tl.float32)
    second = tl.load(states + place + half, mask=inside).to(tl.float32)
    kind = states.dtype.element_ty
    of_first = (first * cosine_1.to(tl.float32)[None, :]).to(kind).to(tl.float32)
    of_second = (second * cosine_2.to(tl.float32)[None, :]).to(kind).to(tl.float32)
    if back:
        of_first += (second * sine_2.to(tl.float32)[None, :]).to(kind).to(tl.float32)
        of_second -= (first * sine_1.to(tl.float32)[None, :]).to(kind).to(tl.float32)
    else:
        of_first -= (second * sine_1.to(tl.float32)[None, :]).to(kind).to(tl.float32)
        of_second += (first * sine_2.to(tl.float32)[None, :]).to(kind).to(tl.float32)
    place = sequence * rotated_sequence + position * rotated_token + head[:, None] * rotated_head + feature[None, :]
    tl.store(rotated + place, of_first.to(kind), mask=inside)
    tl.store(rotated + place + half, of_second.to(kind), mask=inside)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """Rotate states, or take gradients back.

    Args:
        states: (sequences, heads, tokens, features), of any strides but in the last dimension, where it is 1.
        cosine: (1 or sequences, tokens, features), of the states' dtype, contiguous.
        sine: like `cosine`.
        back: take gradients by the rotated states, in place of states, to gradients by the states.
    """
    sequences, heads, tokens, features = states.shape
    rotated = torch.empty_like(states)
    of_sequence = 0 if cosine.shape[0] == 1 else cosine.stride(0)
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
        _rotate[(sequences * tokens, triton.cdiv(heads, HEADS))](
            states, cosine, sine, rotated, heads, tokens, features // 2,
            *states.stride()[:3], *rotated.stride()[:3], of_sequence, cosine.stride(1),
            back=back, together=min(HEADS, triton.next_power_of_2(heads)),
            width=triton.next_power_of_2(features // 2), enable_fp_fusion=False,
        )  # fmt: skip
    return rotated
