"""Round the kept values of a pruned weight to int8, with a scale for each row and group of columns.

Value q of a kept weight w of a group with scale s is w / s, in float32, rounded to the nearest integer, ties to even.
The scale is the largest |w| of the group over 127, in float32, rounded up to bfloat16, so that |q| is at most 127. The
weight comes back as q · s, which float32 holds exactly, rounded to the weight's dtype. A kept weight whose q is 0 is
still kept: it has a value. docs/reference/packed-format.md describes the bytes for other readers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_barber.checkpoint.bits import as_integers, find_kept, put_kept, take_kept
from llm_barber.checkpoint.encoding import Packed, bitmask, encode, smallest_encoding
from llm_barber.checkpoint.memory import Memory, ordinary_memory

GROUP = 128  # columns with a scale of their own
LARGEST = 127  # of a rounded value; the smallest is its negative
ROUNDED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDED_TOGETHER = 1 << 20  # weights; float32 copies of them stay in a core's cache or near it
SMALLEST_SCALE = 1 << 16  # bits, as float32, of the smallest bfloat16 that is not 0


@dataclass(frozen=True)
class Rounded:
    """A packed weight with rounded values.

    `packed`: its values are int8. `scales`: bfloat16, (out, ⌈in / group⌉). `group`: columns of a scale. `dtype`: of the
    weight.
    """

    packed: Packed
    scales: Tensor
    group: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Out, in."""
        return self.packed.shape

    @property
    def values(self) -> Tensor:
        """The kept values, int8, (kept,)."""
        return self.packed.values

    @property
    def bytes(self) -> int:
        """Bytes of values, places and scales."""
        return self.packed.bytes + self.scales.numel() * self.scales.element_size()


def pack_rounded(weight: Tensor, group: int = GROUP) -> Rounded | None:
    """Pack a weight with its kept values rounded to int8.

    None: without rounding no encoding has fewer bytes than the weight, so that it is not pruned, or the dtype is not
    one of `ROUNDED_DTYPES`.

    Args:
        weight: (out, in), on the CPU, finite.
        group: columns of a scale; the last group of a row may have fewer.
    """
    (rows, columns), weights = weight.shape, weight.numel()
    if weight.dtype not in ROUNDED_DTYPES:
        return None
    flat = as_integers(weight.contiguous().view(-1))
    bits = find_kept(flat)
    if smallest_encoding(bits, weights, columns, flat.itemsize)[0] >= flat.nbytes:
        return None
    _, encoding = smallest_encoding(bits, weights, columns, 1)
    places, filled = encode(bits, encoding, weights)
    quotients = np.empty((rows, columns), dtype=np.int8)
    scales = torch.empty(rows, -(-columns // group), dtype=torch.bfloat16, device="cpu")
    for part in _row_blocks(rows, columns):
        rounded, scales[part] = _round_rows(weight[part], group)
        quotients[part] = rounded.numpy()
    values = torch.from_numpy(take_kept(quotients.reshape(-1), filled))
    return Rounded(Packed((rows, columns), encoding, values, torch.from_numpy(places)), scales, group, weight.dtype)


def unpack_rounded(rounded: Rounded, memory: Memory = ordinary_memory) -> Tensor:
    """Unpack a weight, (out, in), of `rounded.dtype`.

    Args:
        rounded: the packed weight, maybe from a hostile file.
        memory: for the weight.

    Raises:
        ValueError: sizes or counts do not fit together, or a value or a scale is outside its range. Sizes are checked
            before memory of the declared size is taken.
    """
    bits = bitmask(rounded.packed)
    check_rounded(rounded)
    rows, columns = rounded.packed.shape
    quotients = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    put_kept(rounded.packed.values.numpy(), bits, quotients.view(-1).numpy())
    weight = memory((rows, columns), rounded.dtype)
    for part in _row_blocks(rows, columns):
        weight[part] = restore_rows(quotients[part], rounded.scales[part], rounded.group, rounded.dtype)
    return weight


def check_rounded(rounded: Rounded) -> None:
    """Check the values and scales of a weight whose bit mask fits its values.

    Raises:
        ValueError: a size, a dtype, a value or a scale is wrong.
    """
    (rows, columns), scales = rounded.packed.shape, rounded.scales
    if rounded.group < 1 or rounded.packed.values.dtype != torch.int8 or rounded.dtype not in ROUNDED_DTYPES:
        raise ValueError(f"a weight of {rounded.dtype} in groups of {rounded.group}, {rounded.packed.values.dtype}")
    if scales.dtype != torch.bfloat16 or scales.shape != (rows, -(-columns // rounded.group)):
        raise ValueError(f"{tuple(scales.shape)} scales of {scales.dtype} do not fit shape {rounded.packed.shape}")
    if not bool(((scales >= 0) & torch.isfinite(scales) & ~torch.signbit(scales)).all()):
        raise ValueError("a scale is negative, infinite or no number")
    if len(rounded.packed.values) and int(rounded.packed.values.min()) < -LARGEST:
        raise ValueError(f"a value is below {-LARGEST}")


def round_trip(weight: Tensor, group: int) -> Tensor:
    """The weight, (out, in), that comes back when this weight was rounded and unpacked; of the same dtype."""
    restored = torch.empty_like(weight)
    for part in _row_blocks(*weight.shape):
        restored[part] = restore_rows(*_round_rows(weight[part], group), group, weight.dtype)
    return restored


def relative_error(weight: Tensor, restored: Tensor) -> float:
    """√(Σ (restored − weight)² / Σ weight²) of two matrices, (out, in); 0 for a weight of zeros."""
    difference = size = 0.0
    for part in _row_blocks(*weight.shape):
        exact = weight[part].double()
        size += exact.square().sum().item()
        difference += (restored[part].double() - exact).square().sum().item()
    return math.sqrt(difference / size) if size else 0.0


def restore_rows(quotients: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Multiply rounded values, int8, (rows, in), by their scales, (rows, ⌈in / group⌉); result of `dtype`.

    Beyond the largest finite number of `dtype` the result is that number. There is no −0.0.
    """
    columns = quotients.shape[1]
    factors = scales.float().repeat_interleave(group, 1)[:, :columns] if group < columns else scales.float()
    largest = torch.finfo(dtype).max
    # Rounding of what float16 cannot hold gives -0.0, which would count as a weight that is kept.
    return (quotients.float() * factors).clamp_(-largest, largest).to(dtype) + 0.0


def _round_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round some rows, (rows, in): the values, int8, (rows, in), and the scales, bfloat16, (rows, ⌈in / group⌉)."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    length = min(group, columns)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * length - columns)).view(rows, groups, length)
    largest = padded.abs().amax(2)
    bits = (largest / LARGEST).view(torch.int32)
    bits = (bits + 0xFFFF) & ~0xFFFF  # up to the next bfloat16
    scales = torch.where(largest > 0, bits.clamp_(min=SMALLEST_SCALE), 0).view(torch.float32)
    divisors = torch.where(scales > 0, scales, 1).unsqueeze(2)
    quotients = (padded / divisors).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return quotients.view(rows, -1)[:, :columns], scales.bfloat16()


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with about `ROUNDED_TOGETHER` weights each."""
    step = max(1, ROUNDED_TOGETHER // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
