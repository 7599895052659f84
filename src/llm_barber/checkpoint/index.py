"""The index files of a checkpoint, dense and packed: tensor → shard.

The names of a packed checkpoint's files are such that no other program takes its folder for a model.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from llm_barber.checkpoint.state import Shard
from llm_barber.checkpoint.untrusted import check_file_name, read_json
from llm_barber.errors import ModelError

PACKED_INDEX = "packed.index.json"
FORMAT_VERSION, ROUNDED_VERSION = 1, 2  # of packed checkpoints: exact values, rounded values
DAMAGED = "the packed checkpoint is damaged; get it again, or pack it again"


def dense_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Content of `model.safetensors.index.json`.

    Args:
        weight_map: the shard of each tensor.
        total_size: bytes of all tensors.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def index_of(shards: Mapping[str, Shard]) -> bytes:
    """Content of `model.safetensors.index.json` of written shards; of packed shards, as they unpack."""
    weight_map = {tensor: shard.file or name for name, shard in shards.items() for tensor in shard.tensors}
    return dense_index(weight_map, sum(shard.bytes for shard in shards.values()))


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
    content = read_json(path, distinct_keys=True, hint=DAMAGED)
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
