"""Packed checkpoint on disk: shards with packed weights, and an index. It is read as hostile input.

A packed weight is two tensors, its kept values and their places (`encoding.py`); the shard's metadata has a table with
the shape and encoding of each. The names of the files are such that no other program takes the folder for a model.
docs/reference/packed-format.md describes the format.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from llm_barber.checkpoint.encoding import Encoding, Packed, bitmask, pack, places_bytes, unpack
from llm_barber.checkpoint.untrusted import check_file_name, read_json
from llm_barber.errors import ModelError

PACKED_INDEX = "packed.index.json"
FORMAT_VERSION = 1
TABLE_KEY = "llm-barber packed"
VALUES, PLACES = ".packed_values", ".packed_places"
LARGEST_SIDE = 2**31
DAMAGED = "the packed checkpoint is damaged; get it again, or pack it again"


class Entry(BaseModel):
    """A packed weight in a table: its shape, (out, in) or (experts, out, in), and its encoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    encoding: Encoding

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the matrix that is packed: the rows of all experts one after the other."""
        return math.prod(self.shape[:-1]), self.shape[-1]


class Table(BaseModel):
    """The table in a packed shard's metadata: the dense file's name and metadata, and the packed weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    file: str
    metadata: dict[str, str] = Field(default_factory=dict)
    packed: dict[str, Entry] = Field(default_factory=dict)


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Pack every matrix, or stack of matrices, of a shard that becomes smaller.

    Returns:
        The tensors to store; the table's entry of each packed matrix.
    """
    stored: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        fits = tensor.dim() in (2, 3) and tensor.is_floating_point() and tensor.numel()
        packed = pack(tensor.reshape(-1, tensor.shape[-1])) if fits else None
        if packed is None:
            stored[name] = tensor
            continue
        stored[name + VALUES], stored[name + PLACES] = packed.values, packed.places
        entries[name] = Entry(shape=tuple(tensor.shape), encoding=packed.encoding)
    return stored, entries


def packed_name(file: str) -> str:
    """Name of the packed shard of a dense file."""
    return f"packed-{file}"


def read_index(folder: Path) -> dict[str, str]:
    """The packed shard of each tensor.

    Raises:
        ModelError: the index is damaged, of another version, or names a file outside the folder.
    """
    path = folder / PACKED_INDEX
    content = read_json(path, distinct_keys=True, hint=DAMAGED)
    version, weight_map = content.get("version"), content.get("weight_map")
    if not isinstance(version, int) or not isinstance(weight_map, dict):
        raise ModelError(f"{path} cannot be read: it has no version, or no weight_map", DAMAGED)
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}", "update llm-barber"
        )
    for file in weight_map.values():
        check_file_name(file, PACKED_INDEX)
    return weight_map


def read_table(
    file: str, metadata: Mapping[str, str] | None, shapes: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Table:
    """A shard's table, checked as far as possible without reading a tensor.

    Args:
        file: the shard's name, for messages.
        metadata: of the shard's header.
        shapes: dtype (safetensors' name) and shape of each tensor in the shard.

    Raises:
        ModelError: a part is missing, left over, or does not fit the table.
    """
    try:
        table = Table.model_validate_json((metadata or {}).get(TABLE_KEY, ""))
    except (ValidationError, RecursionError) as error:
        raise ModelError(f"{file} has no table of packed weights, or a damaged one", DAMAGED) from error
    if table.version != FORMAT_VERSION:
        raise ModelError(f"{file} has format version {table.version}", "update llm-barber")
    check_file_name(table.file, f"the table of {file}")
    if not table.file.endswith(".safetensors"):
        raise ModelError(f"{file} names {table.file!r} as the dense file that it was packed from", "do not trust it")
    for name, entry in table.packed.items():
        parts = [shapes.get(name + suffix) for suffix in (VALUES, PLACES)]
        rows, columns = entry.matrix
        problem = None
        if name in shapes or parts[0] is None or parts[1] is None:
            problem = "lacks a part, or is there twice"
        elif not all(0 < side < LARGEST_SIDE for side in (*entry.shape, rows)):
            problem = f"has shape {entry.shape}"
        elif parts[1] != ("U8", (places_bytes(entry.encoding, rows * columns),)):
            problem = f"has places {parts[1]}, which do not fit its shape {entry.shape}"
        elif len(parts[0][1]) != 1 or parts[0][1][0] > rows * columns:
            problem = f"has values {parts[0]}, which do not fit its shape {entry.shape}"
        if problem:
            raise ModelError(f"{name} in {file} {problem}", DAMAGED)
    for name in shapes:
        if name.endswith((VALUES, PLACES)) and name.removesuffix(VALUES).removesuffix(PLACES) not in table.packed:
            raise ModelError(f"{name} in {file} is not in its table", DAMAGED)
    return table


def read_packed(name: str, entry: Entry, handle: Any, file: str) -> Packed:
    """Read a packed weight of an opened shard, with a bit mask for its places whatever its encoding.

    Raises:
        ModelError: values and places do not fit together.
    """
    values, places = handle.get_tensor(name + VALUES).clone(), handle.get_tensor(name + PLACES).clone()
    try:
        bits = bitmask(Packed(entry.matrix, entry.encoding, values, places))
    except ValueError as error:
        raise ModelError(f"{name} in {file}: {error}", DAMAGED) from error
    return Packed(entry.matrix, Encoding.BITMASK, values, torch.from_numpy(bits))


def unpack_tensor(name: str, entry: Entry, handle: Any, file: str) -> Tensor:
    """Unpack a weight of an opened shard.

    Raises:
        ModelError: values and places do not fit together.
    """
    values, places = handle.get_tensor(name + VALUES).clone(), handle.get_tensor(name + PLACES).clone()
    try:
        return unpack(Packed(entry.matrix, entry.encoding, values, places)).view(entry.shape)
    except ValueError as error:
        raise ModelError(f"{name} in {file}: {error}", DAMAGED) from error
