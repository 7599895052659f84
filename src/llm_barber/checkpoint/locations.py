"""Locations of a checkpoint's tensors in its files, and of the model's parameters in the tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
DTYPES = {
    "C64": torch.complex64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, and its shape and dtype (safetensors' name: "BF16") as the file's header has them."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in the file, unpacked."""
        return math.prod(self.shape) * DTYPES.get(self.dtype, torch.uint8).itemsize


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
