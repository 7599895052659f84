"""Locations of a checkpoint's tensors in its files, and of the model's parameters in the tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
BYTES = {"C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, and its shape and dtype (safetensors' name: "BF16") as the file's header has them."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in the file, unpacked."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


class Part(Protocol):
    """The part of a stacked tensor that is a parameter."""

    def of(self, stacked: Tensor) -> Tensor:
        """A view of the part."""


@dataclass(frozen=True)
class Location:
    """The tensor of a checkpoint in which a parameter of the model lies.

    `part`: None if the parameter is the whole tensor.
    """

    tensor: str
    part: Part | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, a view of the tensor."""
        return tensor if self.part is None else self.part.of(tensor)


def parameters_in(tensors: Mapping[str, Tensor], locations: Mapping[str, Location]) -> dict[str, Tensor]:
    """Parameters, by the names of their locations, that lie in some of a checkpoint's tensors."""
    return {
        name: location.of(tensors[location.tensor])
        for name, location in locations.items()
        if location.tensor in tensors
    }


def shape_of(location: Location, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the parameter at a location; None: the tensor has no such part.

    `shape` is the tensor's.
    """
    try:
        return tuple(location.of(torch.empty(shape, device="meta")).shape)
    except (IndexError, RuntimeError, ValueError):
        return None


def split_by_bytes(names: Iterable[str], tensors: Mapping[str, TensorInfo], limit: int) -> Iterator[list[str]]:
    """Split names into groups of at most `limit` bytes; a tensor larger than that is a group of its own."""
    group: list[str] = []
    total = 0
    for name in names:
        if group and total + tensors[name].bytes > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += tensors[name].bytes
    if group:
        yield group
