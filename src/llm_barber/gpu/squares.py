"""Squares of several gradients, added to their sum in one pass over a GPU's memory.

    total + (f₁ g₁)² + (f₂ g₂)² + …

in that order, in float32. Tested in Triton's interpreter only, and on each GPU before it is used there (`kernels.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 1024  # that a program adds to


@triton.jit  # type: ignore[untyped-decorator]
def _add_squares(  # type: ignore[no-untyped-def]
    total, gradients, factors, numbers, count: tl.constexpr, together: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * together + tl.arange(0, together)
    inside = place < numbers
    added = tl.load(total + place, mask=inside)
    for number in tl.static_range(count):
        gradient = tl.load(gradients + number * numbers.to(tl.int64) + place, mask=inside).to(tl.float32)
        scaled = tl.load(factors + number) * gradient
        added += scaled * scaled
    tl.store(total + place, added, mask=inside)


def add_squares(total: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """Add the squares of n gradients, (n, out, in), each times its factor, to a sum, float32 (out, in).

    All are contiguous. The factors are float32, (n,).
    """
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
        _add_squares[(triton.cdiv(total.numel(), NUMBERS),)](
            total, gradients, factors, total.numel(), count=len(gradients), together=NUMBERS,
            enable_fp_fusion=False,
        )  # fmt: skip
