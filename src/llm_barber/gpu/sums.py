"""Several gradients, each times a scale, added to their sum in one pass over a GPU's memory.

    total + s₁ g₁ + s₂ g₂ + …

in that order, in float32. Tested in Triton's interpreter only, and on each GPU before it is used there (`kernels.py`).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 1024  # that a program adds to
MOST = 4  # gradients


# A kernel's pointers and sizes are all parameters of it, so that it has more than 8.
@triton.jit  # type: ignore[untyped-decorator]
def _add_scaled(  # type: ignore[no-untyped-def]
    total, first, second, third, fourth, scales, numbers,
    count: tl.constexpr, begins: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * together + tl.arange(0, together)
    inside = place < numbers
    added = tl.load(first + place, mask=inside).to(tl.float32) * tl.load(scales)
    if not begins:
        added = tl.load(total + place, mask=inside) + added
    if count > 1:
        added += tl.load(second + place, mask=inside).to(tl.float32) * tl.load(scales + 1)
    if count > 2:
        added += tl.load(third + place, mask=inside).to(tl.float32) * tl.load(scales + 2)
    if count > 3:
        added += tl.load(fourth + place, mask=inside).to(tl.float32) * tl.load(scales + 3)
    tl.store(total + place, added, mask=inside)


def add_scaled(total: Tensor, gradients: Sequence[Tensor], scales: Tensor, begins: bool) -> None:
    """Add gradients, (out, in), each times its scale, to a sum, float32 (out, in). All are contiguous.

    Args:
        total: the sum.
        gradients: at most `MOST`.
        scales: float32, one for each gradient.
        begins: the sum begins with the first gradient, whatever its numbers are.
    """
    pointers = [*gradients, *[gradients[0]] * (MOST - len(gradients))]  # those beyond are not read
    # A launch goes to the current device, whatever the tensors' device is.
    with torch.cuda.device_of(total):  # type: ignore[no-untyped-call]
        _add_scaled[(triton.cdiv(total.numel(), NUMBERS),)](
            total, *pointers, scales, total.numel(), count=len(gradients), begins=begins,
            together=NUMBERS, enable_fp_fusion=False,
        )  # fmt: skip
