"""A checkpoint's safetensors files: opened by safetensors' own reader, and checked against the index."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME
from llm_barber.checkpoint.locations import TensorInfo
from llm_barber.checkpoint.packed_format import PACKED_INDEX, TABLE_KEY, Table, read_index, read_table, unpacked_infos
from llm_barber.checkpoint.untrusted import check_file_name, check_regular, read_json
from llm_barber.errors import ModelError


class ShardFile:
    """An opened safetensors file; it stays mapped until the last reference is gone.

    `stored`: dtype (safetensors' name) and shape of each tensor. `metadata`: of the header. `bytes`: read so far, which
    count as the process's memory.

    Raises:
        ModelError: the file is missing, may not be read, is truncated or is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        check_regular(path)
        try:
            handle: Any = safe_open(os.fspath(path), framework="pt")
            self._handle = handle
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - a handle, no dict
            self.stored = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
            self.metadata: dict[str, str] = handle.metadata() or {}
        except FileNotFoundError as error:  # safetensors raises it for unreadable files, too
            if path.exists():
                raise ModelError(f"{path} may not be read", "check its permissions: ls -l, chmod") from error
            raise ModelError(
                f"shard {path.name} of {path.parent} is missing", "get the checkpoint again, whole"
            ) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def read(self, name: str) -> Tensor:
        """A tensor, which may lie in the mapped file.

        Raises:
            ModelError: the file is damaged.
        """
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(error) from error
        self.bytes += tensor.nbytes
        return tensor

    def _damaged(self, error: Exception) -> ModelError:
        problem = f"{self.path} is truncated or not a safetensors file ({error})"
        return ModelError(problem, "get the file again, whole")


def read_headers(folder: Path, model: str) -> tuple[dict[str, TensorInfo], dict[str, Table]]:
    """The tensors of a checkpoint by their names, and, of a packed checkpoint, the table of each shard.

    Args:
        folder: the checkpoint's folder.
        model: the user's name for it, for messages.

    Raises:
        ModelError: there are no safetensors weights, a shard is missing or damaged, a tensor is there twice, or the
            index and the shards do not agree.
    """
    if (folder / PACKED_INDEX).exists():
        return _packed_headers(folder, model)
    weight_map = _dense_weight_map(folder, model)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())) or [SINGLE_NAME]:
        stored = ShardFile(folder / file).stored
        _add(tensors, {name: TensorInfo(file, shape, dtype) for name, (dtype, shape) in stored.items()}, model)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(
                f"{INDEX_NAME} puts {name} into {file}, which does not have it",
                "the checkpoint is damaged; get it again",
            )
    return tensors, {}


def _dense_weight_map(folder: Path, model: str) -> dict[str, str]:
    """The shard of each tensor as the index has it; empty: there is a single file."""
    if (folder / SINGLE_NAME).exists():  # transformers does not look at an index beside it
        return {}
    if not (folder / INDEX_NAME).exists():
        raise ModelError(f"{model} has no safetensors weights", _hint_without_safetensors(folder))
    weight_map: Any = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX_NAME} has no weight_map", "the index is damaged; get it again")
    for file in weight_map.values():
        check_file_name(file, INDEX_NAME)
    return weight_map


def _packed_headers(folder: Path, model: str) -> tuple[dict[str, TensorInfo], dict[str, Table]]:
    version, weight_map = read_index(folder)
    tensors: dict[str, TensorInfo] = {}
    tables: dict[str, Table] = {}
    for file in sorted(set(weight_map.values())):
        shard = ShardFile(folder / file)
        table = tables[file] = read_table(file, version, shard.metadata.get(TABLE_KEY, ""), shard.stored)
        _add(tensors, unpacked_infos(file, table, shard.stored), model)
    if {name: info.file for name, info in tensors.items()} != weight_map:
        raise ModelError(f"{PACKED_INDEX} and the shards of {model} do not agree", "get it again, whole")
    if len({table.file for table in tables.values()}) < len(tables):
        raise ModelError(f"two shards of {model} name the same dense file", "get it again, whole")
    extra = {path.name for path in folder.glob("packed-*.safetensors")} - tables.keys()
    if extra:
        raise ModelError(f"{PACKED_INDEX} of {model} does not list {min(extra)}", "get it again, whole")
    return tensors, tables


def _add(tensors: dict[str, TensorInfo], more: Mapping[str, TensorInfo], model: str) -> None:
    """Add the tensors of a shard; raise `ModelError` for a tensor that an earlier shard has, too."""
    for name in tensors.keys() & more.keys():
        raise ModelError(
            f"{model} has {name} twice, in {tensors[name].file} and in {more[name].file}",
            "nothing tells which of the two is right: get the checkpoint again, whole",
        )
    tensors |= more


def _hint_without_safetensors(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "pickles can run code when opened and are not read: llm-barber convert makes safetensors of them"
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        return "pickles can run code when opened and are not read: save the model with save_pretrained()"
    if any(folder.glob("model-*-of-*.safetensors")):
        return "its index is missing: the run that wrote it did not finish"
    return f"{SINGLE_NAME} or {INDEX_NAME} is needed"
