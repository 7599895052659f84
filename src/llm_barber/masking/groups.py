"""Reshape linears (out, in) to comparison groups (groups, members), and back; `granularity.py` has the shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_barber.masking.granularity import Granularity


def to_groups(linears: Sequence[Tensor], granularity: Granularity) -> list[Tensor]:
    """Reshape tensors of shape (out, in), any dtype, to tensors of shape (groups, members).

    Returns a tensor for each linear; with `block`, one tensor for all linears.
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
