"""The table of a packed shard: the shape and encoding of each packed weight. It is read as hostile input.

The table stands in the metadata of the shard's header. docs/reference/packed-format.md describes it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from torch import Tensor

from llm_barber.checkpoint.dense_files import header_problem
from llm_barber.checkpoint.digests import has_its_digest, with_digest
from llm_barber.checkpoint.encoding import Encoding, places_bytes
from llm_barber.checkpoint.index import DAMAGED, FORMAT_VERSION, PACKED_INDEX, ROUNDED_VERSION
from llm_barber.checkpoint.locations import FLOAT_DTYPES, TensorInfo
from llm_barber.checkpoint.untrusted import check_file_name, parse_json
from llm_barber.errors import ModelError

TABLE_KEY = "llm-barber packed"
VALUES, PLACES, SCALES = ".packed_values", ".packed_places", ".packed_scales"
LARGEST_SIDE = 2**31


class Entry(BaseModel):
    """A packed weight in a table: its shape, (out, in) or (experts, out, in), and its encoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    encoding: Encoding

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the matrix that is packed: the rows of all experts one after the other."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of its tensors."""
        return VALUES, PLACES


class RoundedEntry(Entry):
    """A packed weight whose values are rounded to int8.

    `dtype`: of the weight, safetensors' name. `group`: columns of a scale. `error`: relative root mean square error of
    the rounding.
    """

    dtype: Literal["BF16", "F16", "F32"]
    group: PositiveInt = Field(lt=1 << 31)
    error: NonNegativeFloat = Field(allow_inf_nan=False)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of its tensors."""
        return VALUES, PLACES, SCALES


class Table(BaseModel):
    """The table in a packed shard's metadata: the dense file's name and metadata, and the packed weights.

    `header`: text of the dense file's header; None: safetensors writes the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    file: str
    metadata: dict[str, str] = Field(default_factory=dict)
    header: str | None = None
    packed: Mapping[str, Entry] = Field(default_factory=dict)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of packed weights' tensors, which no other tensor has."""
        return VALUES, PLACES

    def check(self, name: str, tensor: Tensor, file: str) -> None:
        """Compare a stored tensor of shard `file` with its checksum; this version of the format has none."""

    def text(self) -> str:
        """The table as JSON."""
        return self.model_dump_json(exclude_none=True)


class StoredTensor(BaseModel):
    """A tensor of a shard: safetensors' name of its dtype, its shape, and the sha256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class RoundedTable(Table):
    """The table of a shard of version 2: `tensors` has every stored tensor, `digest` is sha256 of the table."""

    packed: Mapping[str, RoundedEntry] = Field(default_factory=dict)
    tensors: dict[str, StoredTensor]
    digest: str = ""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of packed weights' tensors, which no other tensor has."""
        return VALUES, PLACES, SCALES

    def check(self, name: str, tensor: Tensor, file: str) -> None:
        """Compare a stored tensor of shard `file` with its checksum.

        Raises:
            ModelError: they differ.
        """
        if tensor_digest(tensor) != self.tensors[name].sha256:
            raise ModelError(f"{name} in {file} has changed since it was written (sha256)", DAMAGED)

    def text(self) -> str:
        """The table as JSON, with its digest."""
        return json.dumps(with_digest(self.model_dump(mode="json", exclude_none=True)))


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes as a file has them."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def read_table(
    file: str,
    version: int,
    metadata: Mapping[str, str] | None,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Table:
    """A shard's table, checked as far as possible without reading a tensor.

    Args:
        file: the shard's name, for messages.
        version: of the format, as the index has it.
        metadata: of the shard's header.
        shapes: dtype (safetensors' name) and shape of each tensor in the shard.

    Raises:
        ModelError: a part is missing, left over, or does not fit the table.
    """
    table = _parse_table(file, (metadata or {}).get(TABLE_KEY, ""))
    if table.version != version:
        raise ModelError(f"{file} has format version {table.version}, {PACKED_INDEX} has {version}", DAMAGED)
    check_file_name(table.file, f"the table of {file}")
    if not table.file.endswith(".safetensors"):
        raise ModelError(f"{file} names {table.file!r} as the dense file that it was packed from", "do not trust it")
    for name, entry in table.packed.items():
        if problem := _entry_problem(name, entry, shapes):
            raise ModelError(f"{name} in {file} {problem}", DAMAGED)
    parts = {name + suffix for name, entry in table.packed.items() for suffix in entry.suffixes}
    for name in shapes:
        if name.endswith(table.suffixes) and name not in parts:
            raise ModelError(f"{name} in {file} is not in its table", DAMAGED)
    if table.header is not None:
        problem = header_problem(table.header, dense_infos(table, shapes), table.metadata)
        if problem is not None:
            raise ModelError(f"the dense header that {file} keeps {problem}", DAMAGED)
    if isinstance(table, RoundedTable):
        listed = {name: (tensor.dtype, tensor.shape) for name, tensor in table.tensors.items()}
        if listed != dict(shapes):
            raise ModelError(f"{file} has other tensors than its table", DAMAGED)
    return table


def dense_infos(table: Table, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """The tensors that a shard unpacks to.

    Args:
        table: of the shard, whose entries fit `shapes`.
        shapes: as of `read_table`.
    """
    infos = {
        name: TensorInfo(table.file, shape, dtype)
        for name, (dtype, shape) in shapes.items()
        if not name.endswith(table.suffixes)
    }
    for name, entry in table.packed.items():
        dtype = entry.dtype if isinstance(entry, RoundedEntry) else shapes[name + VALUES][0]
        infos[name] = TensorInfo(table.file, entry.shape, dtype)
    return infos


def _parse_table(file: str, text: str) -> Table:
    """Parse the table of a shard.

    Raises:
        ModelError: there is none, it is damaged, or it is of another version.
    """
    try:
        content = parse_json(text, distinct_keys=True)
        version = content.get("version") if isinstance(content, dict) else None
        if version != ROUNDED_VERSION:
            table = Table.model_validate_json(text)
        elif has_its_digest(content):
            table = RoundedTable.model_validate(content)
        else:
            raise ValueError("its digest does not fit")
    except (ValueError, ValidationError, RecursionError) as error:
        raise ModelError(f"{file} has no table of packed weights, or a damaged one", DAMAGED) from error
    if table.version not in (FORMAT_VERSION, ROUNDED_VERSION):
        raise ModelError(f"{file} has format version {table.version}", "update llm-barber")
    return table


def _entry_problem(name: str, entry: Entry, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Name what is wrong with the stored parts of a packed weight; None: nothing is."""
    rows, columns = entry.matrix
    parts = [shapes.get(name + suffix) for suffix in entry.suffixes]
    if name in shapes or None in parts:
        return "lacks a part, or is there twice"
    values, places, *scales = (part for part in parts if part is not None)
    if not all(0 < side < LARGEST_SIDE for side in (*entry.shape, rows)):
        return f"has shape {entry.shape}"
    if places != ("U8", (places_bytes(entry.encoding, rows * columns),)):
        return f"has places {places}, which do not fit its shape {entry.shape}"
    if len(values[1]) != 1 or values[1][0] > rows * columns:
        return f"has values {values}, which do not fit its shape {entry.shape}"
    if isinstance(entry, RoundedEntry):
        if values[0] != "I8":
            return f"has values of {values[0]}, which are not rounded"
        if scales != [("BF16", (rows, -(-columns // entry.group)))]:
            return f"has scales {scales[0]}, which do not fit its shape {entry.shape} in groups of {entry.group}"
    elif values[0] not in FLOAT_DTYPES:
        return f"has values of {values[0]}, which are no weights"
    return None
