"""Read the headers of a checkpoint's shards, dense or packed, and check its index against them."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME
from llm_barber.checkpoint.index import PACKED_INDEX, read_index
from llm_barber.checkpoint.locations import TensorInfo
from llm_barber.checkpoint.packed_table import Table, dense_infos, read_table
from llm_barber.checkpoint.regular import check_regular
from llm_barber.checkpoint.untrusted import check_file_name, check_header, read_json
from llm_barber.errors import ModelError

READ_OPEN = 1 << 28  # bytes; pages of a mapped file count as the process's memory


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
    return _dense_headers(folder, model), {}


def _dense_headers(folder: Path, model: str) -> dict[str, TensorInfo]:
    weight_map: Any = {}
    if (folder / SINGLE_NAME).exists():  # transformers does not look at an index beside it
        files = [SINGLE_NAME]
    elif (folder / INDEX_NAME).exists():
        weight_map = read_json(folder / INDEX_NAME, distinct_keys=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"{INDEX_NAME} has no weight_map", "the index is damaged; get it again")
        files = sorted(set(weight_map.values()))
    else:
        raise ModelError(f"{model} has no safetensors weights", _hint_without_safetensors(folder))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        check_file_name(file, INDEX_NAME)
        _refuse_missing(folder, file, model)
        with OpenedShard(folder / file) as handle:
            check_header(folder / file)
            for name in handle.keys():  # noqa: SIM118 - a handle, not a dict
                _refuse_repeated(name, tensors, file, model)
                part = handle.get_slice(name)
                tensors[name] = TensorInfo(file, tuple(part.get_shape()), str(part.get_dtype()))
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise ModelError(
                f"{INDEX_NAME} puts {name} into {file}, which does not have it",
                "the checkpoint is damaged; get it again",
            )
    return tensors


def _packed_headers(folder: Path, model: str) -> tuple[dict[str, TensorInfo], dict[str, Table]]:
    version, weight_map = read_index(folder)
    tensors: dict[str, TensorInfo] = {}
    tables: dict[str, Table] = {}
    for file in sorted(set(weight_map.values())):
        _refuse_missing(folder, file, model)
        with OpenedShard(folder / file) as handle:
            check_header(folder / file)
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - a handle
            stored = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
            table = tables[file] = read_table(file, version, handle.metadata(), stored)
        for name in (*stored, *table.packed):
            _refuse_repeated(name, tensors, file, model)
        tensors |= {name: replace(info, file=file) for name, info in dense_infos(table, stored).items()}
    if {name: info.file for name, info in tensors.items()} != weight_map:
        raise ModelError(f"{PACKED_INDEX} and the shards of {model} do not agree", "get it again, whole")
    extra = {path.name for path in folder.glob("packed-*.safetensors")} - set(weight_map.values())
    if extra:
        raise ModelError(f"{PACKED_INDEX} of {model} does not list {min(extra)}", "get it again, whole")
    return tensors, tables


def _refuse_missing(folder: Path, file: str, model: str) -> None:
    """Raise `ModelError` for a shard that is not in the folder."""
    if not (folder / file).exists():
        raise ModelError(f"shard {file} of {model} is missing", "get the checkpoint again, whole")


def _refuse_repeated(name: str, tensors: Mapping[str, TensorInfo], file: str, model: str) -> None:
    """Raise `ModelError` for a tensor that an earlier shard has, too."""
    if name in tensors:
        raise ModelError(
            f"{model} has {name} twice, in {tensors[name].file} and in {file}",
            "nothing tells which of the two is right: get the checkpoint again, whole",
        )


def _hint_without_safetensors(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "pickles can run code when opened and are not read: llm-barber convert makes safetensors of them"
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        return "pickles can run code when opened and are not read: save the model with save_pretrained()"
    if any(folder.glob("model-*-of-*.safetensors")):
        return "its index is missing: the run that wrote it did not finish"
    return f"{SINGLE_NAME} or {INDEX_NAME} is needed"


class OpenedShard:
    """`safe_open` as a context manager whose errors name the file and say what to do.

    Raises:
        ModelError: the file is missing, may not be read, is truncated or is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        check_regular(self.path)
        try:
            self.handle: Any = safe_open(os.fspath(self.path), framework="pt")
            return self.handle.__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, ValueError) as error:
            raise self.damaged(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with suppress(Exception):
            self.handle.__exit__(None, None, None)
        if isinstance(error, SafetensorError):
            raise self.damaged(error) from error

    def damaged(self, error: BaseException) -> ModelError:
        """Error that names the file."""
        if isinstance(error, FileNotFoundError):  # safetensors raises it for unreadable files, too
            if self.path.exists():
                return ModelError(f"{self.path} may not be read", "check its permissions: ls -l, chmod")
            return ModelError(f"{self.path} is not there any more", "put it back")
        return ModelError(f"{self.path} is truncated or not a safetensors file ({error})", "get the file again, whole")


class LastShard:
    """The shard that was opened last, kept open until another is needed or `READ_OPEN` bytes were read.

    `bytes`: number of bytes read since the shard was opened; the caller adds what it reads.
    """

    def __init__(self) -> None:
        self._shard: OpenedShard | None = None
        self.bytes = 0

    def opened(self, path: Path) -> OpenedShard:
        """The shard at a path, open; errors as of `OpenedShard`."""
        if self._shard is not None and self._shard.path == path and self.bytes < READ_OPEN:
            return self._shard
        self.close()
        shard = OpenedShard(path)
        shard.__enter__()
        self._shard, self.bytes = shard, 0
        return shard

    def close(self) -> None:
        """Close the shard."""
        if self._shard is not None:
            self._shard.__exit__(None, None, None)
            self._shard = None
