"""Packed weights of a shard: what is stored of each, and the weight that is read back.

A packed weight is two tensors, its kept values and their places (`encoding.py`), or three: rounded values have scales
(`rounding.py`). `packed_format.py` has the table that says which weights are packed. What a file says is checked before
memory is taken.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_barber.checkpoint.encoding import Encoding, Packed, bitmask, pack, unpack
from llm_barber.checkpoint.locations import DTYPE_NAMES, DTYPES
from llm_barber.checkpoint.memory import Memory, copied, ordinary_memory
from llm_barber.checkpoint.packed_format import (
    DAMAGED,
    FORMAT_VERSION,
    PLACES,
    ROUNDED_VERSION,
    TABLE_KEY,
    VALUES,
    Entry,
    RoundedEntry,
    StoredTensor,
    Table,
    packed_name,
)
from llm_barber.checkpoint.rounding import (
    ROUNDED_DTYPES,
    Rounded,
    check_rounded,
    pack_rounded,
    relative_error,
    unpack_rounded,
)
from llm_barber.checkpoint.shards import ShardFile
from llm_barber.errors import ModelError


class Packing:
    """Packs shards: every matrix, or stack of matrices, that becomes smaller.

    `entries`: the tables' entries of all matrices that were packed so far.

    Args:
        rounds: round kept values to int8.
        restored: called with the name and the tensor that will be read back, of every tensor of a rounded shard.
    """

    def __init__(self, rounds: bool = False, restored: Callable[[str, Tensor], None] = lambda *_: None) -> None:
        self.rounds = rounds
        self.version = ROUNDED_VERSION if rounds else FORMAT_VERSION
        self.entries: dict[str, Entry] = {}
        self._restored = restored

    def pack(
        self, file: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """Pack the tensors of a dense file: the name, the tensors and the metadata to write."""
        stored: dict[str, Tensor] = {}
        entries: dict[str, Entry] = {}
        for name, tensor in tensors.items():
            parts, entry = (self._rounded if self.rounds else self._exact)(name, tensor)
            stored |= parts
            if entry is not None:
                entries[name] = entry
        self.entries |= entries
        content: dict[str, Any] = {"file": file, "metadata": dict(metadata), "packed": entries}
        if self.rounds:
            content["tensors"] = {name: _listed(tensor) for name, tensor in stored.items()}
        return packed_name(file), stored, {TABLE_KEY: Table(version=self.version, **content).text()}

    def _exact(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Entry | None]:
        packed = pack(_matrix(tensor)) if _can_be_packed(tensor) else None
        if packed is None:
            return {name: tensor}, None
        entry = Entry(shape=tuple(tensor.shape), encoding=packed.encoding)
        return {name + VALUES: packed.values, name + PLACES: packed.places}, entry

    def _rounded(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Entry | None]:
        rounded = pack_rounded(_matrix(tensor)) if _can_be_packed(tensor) else None
        if rounded is None:
            self._restored(name, tensor)
            return {name: tensor}, None
        restored = unpack_rounded(rounded)
        self._restored(name, restored.view(tensor.shape))
        dtype: Any = DTYPE_NAMES[rounded.dtype]
        entry = RoundedEntry(
            shape=tuple(tensor.shape), encoding=rounded.packed.encoding, dtype=dtype, group=rounded.group,
            error=relative_error(_matrix(tensor), restored),
        )  # fmt: skip
        parts = (rounded.packed.values, rounded.packed.places, rounded.scales)
        return {name + suffix: part for suffix, part in zip(entry.suffixes, parts, strict=True)}, entry


def can_be_rounded(tensor: Tensor) -> bool:
    """Tell whether a `Packing` rounds a tensor."""
    return tensor.dtype in ROUNDED_DTYPES and _can_be_packed(tensor) and pack(_matrix(tensor)) is not None


def _can_be_packed(tensor: Tensor) -> bool:
    return tensor.dim() in (2, 3) and tensor.is_floating_point() and tensor.numel() > 0


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _listed(tensor: Tensor) -> StoredTensor:
    return StoredTensor(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), sha256=tensor_digest(tensor))


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes as a file has them."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def read_tensor(name: str, table: Table, shard: ShardFile, memory: Memory = ordinary_memory) -> Tensor:
    """Read a tensor of a shard into `memory`, unpacked if it is packed.

    Raises:
        ModelError: parts do not fit together, or a checksum does not fit.
    """
    if name not in table.packed:
        return _read_stored(name, table, shard, memory)
    packed = _read_parts(name, table, shard, ordinary_memory)
    try:
        tensor = unpack(packed, memory) if isinstance(packed, Packed) else unpack_rounded(packed, memory)
    except ValueError as error:
        raise ModelError(f"{name} in {shard.path.name}: {error}", DAMAGED) from error
    return tensor.view(table.packed[name].shape)


def read_packed(name: str, table: Table, shard: ShardFile, memory: Memory) -> Packed | Rounded:
    """Read a packed weight of a shard into `memory`, with a bit mask for its places whatever its encoding.

    Raises:
        ModelError: parts do not fit together, or a checksum does not fit.
    """
    parts = _read_parts(name, table, shard, memory)
    packed = parts if isinstance(parts, Packed) else parts.packed
    try:
        bits = torch.from_numpy(bitmask(packed))
        if isinstance(parts, Rounded):
            check_rounded(parts)
    except ValueError as error:
        raise ModelError(f"{name} in {shard.path.name}: {error}", DAMAGED) from error
    packed = Packed(packed.shape, Encoding.BITMASK, packed.values, bits)
    return packed if isinstance(parts, Packed) else replace(parts, packed=packed)


def _read_parts(name: str, table: Table, shard: ShardFile, memory: Memory) -> Packed | Rounded:
    """Read the parts of a packed weight as they are stored.

    Raises:
        ModelError: a checksum does not fit.
    """
    entry = table.packed[name]
    memories = {PLACES: memory if entry.encoding is Encoding.BITMASK else ordinary_memory}  # others are decoded
    values, places, *scales = (
        _read_stored(name + suffix, table, shard, memories.get(suffix, memory)) for suffix in entry.suffixes
    )
    packed = Packed(entry.matrix, entry.encoding, values, places)
    if isinstance(entry, RoundedEntry):
        return Rounded(packed, scales[0], entry.group, DTYPES[entry.dtype])
    return packed


def _read_stored(name: str, table: Table, shard: ShardFile, memory: Memory) -> Tensor:
    """Read a stored tensor, a copy, so that no file stays mapped, and compare it with its checksum if it has one."""
    tensor = copied(shard.read(name), memory)
    if name in table.tensors and tensor_digest(tensor) != table.tensors[name].sha256:
        raise ModelError(f"{name} in {shard.path.name} has changed since it was written (sha256)", DAMAGED)
    return tensor
