"""The index files of a checkpoint, dense and packed: tensor → shard."""

import json
from collections.abc import Mapping

from llm_barber.checkpoint.state import Shard


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
