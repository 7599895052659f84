"""Packed weights of a shard: what is stored of each, and the weight that is read back.

A packed weight is two tensors, its kept values and their places (`encoding.py`), or three: rounded values have scales
(`rounding.py`). `packed_table.py` has the table that says which weights are packed. What a file says is checked before
memory is taken.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_barber.checkpoint.encoding import Encoding, Packed, bitmask, pack, unpack
from llm_barber.checkpoint.index import DAMAGED
from llm_barber.checkpoint.memory import Memory, copied, ordinary_memory
from llm_barber.checkpoint.packed_table import PLACES, VALUES, Entry, RoundedEntry, Table
from llm_barber.checkpoint.rounding import Rounded, check_rounded, pack_rounded, relative_error, unpack_rounded
from llm_barber.errors import ModelError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # of weights whose values are rounded
DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Pack every matrix, or stack of matrices, of a shard that becomes smaller.

    Returns:
        The tensors to store; the table's entry of each packed matrix.
    """
    stored: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        packed = pack(_matrix(tensor)) if _can_be_packed(tensor) else None
        if packed is None:
            stored[name] = tensor
            continue
        stored[name + VALUES], stored[name + PLACES] = packed.values, packed.places
        entries[name] = Entry(shape=tuple(tensor.shape), encoding=packed.encoding)
    return stored, entries


def pack_tensor_rounded(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], RoundedEntry | None, Tensor]:
    """Pack a matrix, or a stack of matrices, with its kept values rounded to int8.

    Returns:
        The tensors to store; the table's entry, None: the tensor is not pruned, or not of a dtype that is rounded, and
        is stored as it is; the tensor as it will be read.
    """
    rounded = pack_rounded(_matrix(tensor)) if _can_be_packed(tensor) else None
    if rounded is None:
        return {name: tensor}, None, tensor
    restored = unpack_rounded(rounded)
    entry = RoundedEntry(
        shape=tuple(tensor.shape), encoding=rounded.packed.encoding, dtype=DTYPE_NAMES[rounded.dtype],
        group=rounded.group, error=relative_error(_matrix(tensor), restored),
    )  # fmt: skip
    parts = (rounded.packed.values, rounded.packed.places, rounded.scales)
    stored = {name + suffix: part for suffix, part in zip(entry.suffixes, parts, strict=True)}
    return stored, entry, restored.view(tensor.shape)


def can_be_rounded(tensor: Tensor) -> bool:
    """Tell whether `pack_tensor_rounded` rounds a tensor."""
    return tensor.dtype in DTYPE_NAMES and _can_be_packed(tensor) and pack(_matrix(tensor)) is not None


def _can_be_packed(tensor: Tensor) -> bool:
    return tensor.dim() in (2, 3) and tensor.is_floating_point() and tensor.numel() > 0


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def read_tensor(name: str, table: Table, handle: Any, file: str, memory: Memory = ordinary_memory) -> Tensor:
    """Read a tensor of an opened shard into `memory`, unpacked if it is packed.

    Raises:
        ModelError: parts do not fit together, or a checksum does not fit.
    """
    if name not in table.packed:
        return _read_stored(name, table, handle, file, memory)
    packed = _read_parts(name, table, handle, file, ordinary_memory)
    try:
        tensor = unpack(packed, memory) if isinstance(packed, Packed) else unpack_rounded(packed, memory)
    except ValueError as error:
        raise ModelError(f"{name} in {file}: {error}", DAMAGED) from error
    return tensor.view(table.packed[name].shape)


def read_packed(name: str, table: Table, handle: Any, file: str, memory: Memory) -> Packed | Rounded:
    """Read a packed weight of an opened shard into `memory`, with a bit mask for its places whatever its encoding.

    Raises:
        ModelError: parts do not fit together, or a checksum does not fit.
    """
    parts = _read_parts(name, table, handle, file, memory)
    packed = parts if isinstance(parts, Packed) else parts.packed
    try:
        bits = torch.from_numpy(bitmask(packed))
        if isinstance(parts, Rounded):
            check_rounded(parts)
    except ValueError as error:
        raise ModelError(f"{name} in {file}: {error}", DAMAGED) from error
    packed = Packed(packed.shape, Encoding.BITMASK, packed.values, bits)
    return packed if isinstance(parts, Packed) else replace(parts, packed=packed)


def _read_parts(name: str, table: Table, handle: Any, file: str, memory: Memory) -> Packed | Rounded:
    """Read the parts of a packed weight as they are stored.

    Raises:
        ModelError: a checksum does not fit.
    """
    entry = table.packed[name]
    memories = {PLACES: memory if entry.encoding is Encoding.BITMASK else ordinary_memory}  # others are decoded
    values, places, *scales = (
        _read_stored(name + suffix, table, handle, file, memories.get(suffix, memory)) for suffix in entry.suffixes
    )
    packed = Packed(entry.matrix, entry.encoding, values, places)
    if isinstance(entry, RoundedEntry):
        return Rounded(packed, scales[0], entry.group, DTYPES[entry.dtype])
    return packed


def _read_stored(name: str, table: Table, handle: Any, file: str, memory: Memory) -> Tensor:
    """Read a stored tensor, a copy, so that no file stays mapped, and check it."""
    tensor = copied(handle.get_tensor(name), memory)
    table.check(name, tensor, file)
    return tensor
