"""What competes with what: linears (out, in) reshaped to comparison groups (groups, members), and back.

granularity   groups of a block with linears of 4 × 6 and 2 × 6
output        4 groups of 6, 2 groups of 6     one output row
input         6 groups of 4, 6 groups of 2     one input column
linear        1 group of 24, 1 group of 12     one linear
block         1 group of 36                    all linears of the block together
"""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Granularity(StrEnum):
    """The set within which weights compete (arXiv 2408.10631)."""

    OUTPUT = "output"
    INPUT = "input"
    LINEAR = "linear"
    BLOCK = "block"


def to_groups(linears: Sequence[Tensor], granularity: Granularity) -> list[Tensor]:
    """Reshape tensors of shape (out, in), any dtype, to tensors of shape (groups, members).

    One tensor per linear; with `block`, one tensor for all of them.
    """
    match granularity:
        case Granularity.OUTPUT:
            return list(linears)
        case Granularity.INPUT:
            return [tensor.t().contiguous() for tensor in linears]
        case Granularity.LINEAR:
            return [tensor.reshape(1, -1) for tensor in linears]
        case Granularity.BLOCK:
            return [torch.cat([tensor.reshape(-1) for tensor in linears]).unsqueeze(0)]


def from_groups(groups: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], granularity: Granularity) -> list[Tensor]:
    """Undo `to_groups`: tensors of shape (groups, members) back to the linears' (out, in) `shapes`."""
    match granularity:
        case Granularity.INPUT:
            return [tensor.t().contiguous() for tensor in groups]
        case Granularity.BLOCK:
            sizes = [rows * columns for rows, columns in shapes]
            parts = torch.split_with_sizes(groups[0].reshape(-1), sizes)
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        case _:
            return [tensor.reshape(shape) for tensor, shape in zip(groups, shapes, strict=True)]
