"""The packed format: the folder's index, each shard's table, the entry in config.json. Files are read as hostile input.

docs/reference/packed-format.md describes the format. The names of a packed checkpoint's files are such that no other
program takes its folder for a model.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError

from llm_barber.checkpoint.digests import has_its_digest, with_digest
from llm_barber.checkpoint.encoding import Encoding, places_bytes
from llm_barber.checkpoint.locations import FLOAT_DTYPES, TensorInfo
from llm_barber.checkpoint.untrusted import check_file_name, parse_json, read_json
from llm_barber.errors import ModelError

PACKED_INDEX = "packed.index.json"
FORMAT_VERSION, ROUNDED_VERSION = 1, 2  # of packed checkpoints: exact values, rounded values
DAMAGED = "the packed checkpoint is damaged; get it again, or pack it again"
TABLE_KEY = "llm-barber packed"  # of the metadata in a shard's header
VALUES, PLACES, SCALES = ".packed_values", ".packed_places", ".packed_scales"
LARGEST_SIDE = 2**31

CONFIGURATION = "config.json"
KEY = "quantization_config"
QUANT_METHOD = "llm-barber"
WEIGHTS = "weights"  # key of the entry: a shard, by which transformers finds the folder
ENTRY_KEYS = {"quant_method", WEIGHTS, "needs"}
NEEDS = (
    "pip install llm-barber, and in Python before from_pretrained: import llm_barber; llm_barber.register(). "
    "Or make an ordinary checkpoint of it: llm-barber unpack FOLDER DENSE"
)
# The entry is recognised by its bytes: they are not to be changed.
BEGIN = f'\n  "{KEY}": {{\n    "quant_method": "{QUANT_METHOD}",\n    "{WEIGHTS}": "'.encode()
END = f'",\n    "needs": "{NEEDS}"\n  }}'.encode()
ENTRY = re.compile(rb",?" + re.escape(BEGIN) + rb"[\w.-]+" + re.escape(END) + rb"(?=\s*}\s*\Z)")

Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype (safetensors' name) and shape of each tensor in a shard


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


class StoredTensor(BaseModel):
    """A tensor of a shard: safetensors' name of its dtype, its shape, and the sha256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Table(BaseModel):
    """The table in a packed shard's metadata: the dense file's name and metadata, and the packed weights.

    `header`: of the dense file, in tables of earlier programs; it is not used. `tensors`: every stored tensor, and
    `digest`: sha256 of the table; both in version 2 alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    file: str
    metadata: dict[str, str] = {}
    header: str | None = None
    packed: Mapping[str, RoundedEntry | Entry] = {}
    tensors: dict[str, StoredTensor] = {}
    digest: str = ""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of packed weights' tensors, which no other tensor has."""
        return (VALUES, PLACES, SCALES) if self.version == ROUNDED_VERSION else (VALUES, PLACES)

    def text(self) -> str:
        """The table as JSON; in version 2 with its digest."""
        content = self.model_dump(mode="json", exclude_unset=True)
        return json.dumps(with_digest(content) if self.version == ROUNDED_VERSION else content)


def read_table(file: str, version: int, text: str, stored: Stored) -> Table:
    """Read a shard's table, and check it as far as possible without reading a tensor.

    Args:
        file: the shard's name, for messages.
        version: of the format, as the index has it.
        text: of the table.
        stored: the tensors in the shard.

    Raises:
        ModelError: the table is damaged, or a part is missing, left over, or does not fit the table.
    """
    table = _parse_table(file, text)
    if table.version != version:
        raise ModelError(f"{file} has format version {table.version}, {PACKED_INDEX} has {version}", DAMAGED)
    check_file_name(table.file, f"the table of {file}")
    if not table.file.endswith(".safetensors"):
        raise ModelError(f"{file} names {table.file!r} as the dense file that it was packed from", "do not trust it")
    for name, entry in table.packed.items():
        if problem := _entry_problem(name, entry, stored):
            raise ModelError(f"{name} in {file} {problem}", DAMAGED)
    parts = {name + suffix for name, entry in table.packed.items() for suffix in entry.suffixes}
    for name in stored:
        if name.endswith(table.suffixes) and name not in parts:
            raise ModelError(f"{name} in {file} is not in its table", DAMAGED)
    listed = {name: (tensor.dtype, tensor.shape) for name, tensor in table.tensors.items()}
    if version == ROUNDED_VERSION and listed != dict(stored):
        raise ModelError(f"{file} has other tensors than its table", DAMAGED)
    return table


def unpacked_infos(file: str, table: Table, stored: Stored) -> dict[str, TensorInfo]:
    """The tensors that shard `file` unpacks to; the table's entries fit `stored`."""
    infos = {
        name: TensorInfo(file, shape, dtype)
        for name, (dtype, shape) in stored.items()
        if not name.endswith(table.suffixes)
    }
    for name, entry in table.packed.items():
        dtype = entry.dtype if isinstance(entry, RoundedEntry) else stored[name + VALUES][0]
        infos[name] = TensorInfo(file, entry.shape, dtype)
    return infos


def _parse_table(file: str, text: str) -> Table:
    """Parse the table of a shard.

    Raises:
        ModelError: there is none, it is damaged, or it is of another version.
    """
    try:
        content = parse_json(text)
        table = Table.model_validate(content)
        rounded = table.version == ROUNDED_VERSION
        if rounded and not has_its_digest(content):
            raise ValueError("its digest does not fit")
        if any(isinstance(entry, RoundedEntry) is not rounded for entry in table.packed.values()):
            raise ValueError("its entries are of another version")
    except (ValueError, ValidationError, RecursionError) as error:
        raise ModelError(f"{file} has no table of packed weights, or a damaged one", DAMAGED) from error
    if table.version not in (FORMAT_VERSION, ROUNDED_VERSION):
        raise ModelError(f"{file} has format version {table.version}", "update llm-barber")
    return table


def _entry_problem(name: str, entry: Entry, stored: Stored) -> str | None:
    """Name what is wrong with the stored parts of a packed weight; None: nothing is."""
    rows, columns = entry.matrix
    parts = [stored.get(name + suffix) for suffix in entry.suffixes]
    if name in stored or None in parts:
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


def packed_index(weight_map: Mapping[str, str], version: int) -> bytes:
    """Content of `packed.index.json`.

    Args:
        weight_map: the packed shard of each tensor.
        version: of the format.
    """
    content = {"version": version, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def packed_name(file: str) -> str:
    """Name of the packed shard of a dense file."""
    return f"packed-{file}"


def read_index(folder: Path) -> tuple[int, dict[str, str]]:
    """The format's version, and the packed shard of each tensor.

    Raises:
        ModelError: the index is damaged, of another version, or names a file outside the folder.
    """
    path = folder / PACKED_INDEX
    content = read_json(path, hint=DAMAGED)
    version, weight_map = content.get("version"), content.get("weight_map")
    if type(version) is not int or not isinstance(weight_map, dict):
        raise ModelError(f"{path} cannot be read: it has no version, or no weight_map", DAMAGED)
    if version not in (FORMAT_VERSION, ROUNDED_VERSION):
        raise ModelError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION} and {ROUNDED_VERSION}",
            "update llm-barber",
        )
    for file in weight_map.values():
        check_file_name(file, PACKED_INDEX)
    return version, weight_map


def names_packed(configuration: Mapping[str, Any]) -> bool:
    """Tell whether a configuration says that the weights are packed by this program."""
    entry = configuration.get(KEY)
    return isinstance(entry, Mapping) and entry.get("quant_method") == QUANT_METHOD


def packed_configuration(content: bytes, shards: Iterable[str]) -> bytes:
    """Add the entry that names the format, as the last, to the bytes of a config.json.

    transformers finds this package's reader by it (`runtime/registry.py`); without the package it refuses the folder.

    Example: b'{"a": 1}' -> b'{"a": 1,\\n  "quantization_config": {…}}'.

    Args:
        content: of the file, with or without the entry.
        shards: the folder's packed shards.
    """
    plain = plain_configuration(content)
    settings = plain.rstrip().removesuffix(b"}").rstrip()
    comma = b"" if settings.endswith(b"{") else b","
    return settings + comma + BEGIN + min(shards).encode() + END + plain[len(settings) :]


def plain_configuration(content: bytes) -> bytes:
    """Take the entry out of the bytes of a config.json; without the entry they stay as they are.

    A file that was written anew since has the entry in other bytes: it is written anew without the entry.
    """
    if ENTRY.search(content):
        return ENTRY.sub(b"", content)
    try:
        configuration = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(configuration, dict) or not names_packed(configuration):
        return content
    del configuration[KEY]
    return (json.dumps(configuration, indent=2, ensure_ascii=False) + "\n").encode()
