"""The dense file that a packed shard unpacks to, byte for byte.

safetensors writes several keys of metadata in random order, and other programs order tensors otherwise. Where
safetensors would not write a file's header again, the table of the packed shard keeps the header's text.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from llm_barber.checkpoint.locations import TensorInfo
from llm_barber.checkpoint.untrusted import parse_json

METADATA = "__metadata__"
LENGTH_BYTES = 8  # the header's length, little-endian, before the header
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def header_to_keep(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str | None:
    """Text of a dense file's header if safetensors may write another; None: it writes the same.

    Args:
        path: of the file.
        infos: of all tensors of the file.
        tensors: the same tensors.
        metadata: of the file's header.
    """
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")).decode("utf-8")
    if len(metadata) < 2 and text == _written_header(tensors, metadata):
        return None
    return None if header_problem(text, infos, metadata) else text


def _written_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Header that safetensors writes: it orders empty tensors of these names and dtypes, which get their sizes here."""
    content = save({name: tensor.new_empty(0) for name, tensor in tensors.items()}, dict(metadata))
    header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")])
    position = 0
    for name, entry in header.items():
        if name != METADATA:
            end = position + tensors[name].nbytes
            entry["shape"], entry["data_offsets"], position = list(tensors[name].shape), [position, end], end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % LENGTH_BYTES)


def header_problem(text: str, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """Name what is wrong with the text of a header, maybe from a hostile file; None: nothing is.

    Args:
        text: JSON.
        infos: of all tensors that the header must have.
        metadata: that it must have.
    """
    try:
        header = parse_json(text, distinct_keys=True)
    except ValueError as error:
        return f"is not a header: {error}"
    if not isinstance(header, dict) or header.pop(METADATA, {}) != dict(metadata):
        return "has other metadata than the table"
    if header.keys() != infos.keys():
        return "has other tensors than the shard"
    ranges = []
    for name, entry in header.items():
        info = infos[name]
        if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS or entry["dtype"] != info.dtype:
            return f"has an entry of {name} that does not fit the tensor"
        shape, offsets = _whole_numbers(entry["shape"]), _whole_numbers(entry["data_offsets"])
        if shape != info.shape or offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != info.bytes:
            return f"has a size of {name} that does not fit the tensor"
        ranges.append(offsets)
    ranges.sort()
    ends = [0, *(end for _, end in ranges)]
    return None if [first for first, _ in ranges] == ends[:-1] else "has tensors that do not follow each other"


def _whole_numbers(numbers: Any) -> tuple[int, ...] | None:
    """The numbers of a list in JSON; None: it is no list of whole numbers."""
    if isinstance(numbers, list) and all(type(number) is int for number in numbers):
        return tuple(numbers)
    return None


def content_with_header(tensors: Mapping[str, Tensor], header: str) -> Iterator[memoryview | bytes]:
    """Content of a safetensors file, piece by piece.

    Args:
        tensors: all tensors of the file, contiguous and on the CPU.
        header: its text, which has no `header_problem`.
    """
    text = header.encode()
    yield len(text).to_bytes(LENGTH_BYTES, "little") + text
    entries = {name: entry for name, entry in json.loads(header).items() if name != METADATA}
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def dense_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], header: str | None) -> str:
    """sha256 of the dense file that a packed shard unpacks to.

    Args:
        tensors: of the dense file, contiguous and on the CPU.
        metadata: of the dense file's header.
        header: its text; None: safetensors writes it.
    """
    if header is None:
        return hashlib.sha256(save(dict(tensors), dict(metadata))).hexdigest()
    digest = hashlib.sha256()
    for piece in content_with_header(tensors, header):
        digest.update(piece)
    return digest.hexdigest()
