"""Read a checkpoint tensor by tensor: a local folder with safetensors, a hub id, or a GGUF file.

Nothing is unpickled, and no code that comes with a model is run. What an index says is checked against the files.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_barber.checkpoint.companions import companions, refuse_adapter, refuse_quantised
from llm_barber.checkpoint.counts import check_counts
from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME, resolve_model
from llm_barber.checkpoint.packed import PACKED_INDEX, PLACES, VALUES, Table, read_index, read_table, unpack_tensor
from llm_barber.checkpoint.regular import check_regular
from llm_barber.checkpoint.state import files_key
from llm_barber.checkpoint.untrusted import check_file_name, check_header, read_json
from llm_barber.errors import ModelError, NotFiniteError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and its shape and dtype (safetensors' name: "BF16") as the file's header has them."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


class Part(Protocol):
    """What a parameter is of a tensor that holds several."""

    def of(self, stacked: Tensor) -> Tensor:
        """A view of it."""


@dataclass(frozen=True)
class Location:
    """The tensor in which a parameter of the model lies, and which part of it it is, if not all."""

    tensor: str
    part: Part | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter, a view of the tensor."""
        return tensor if self.part is None else self.part.of(tensor)


def shape_of(location: Location, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the parameter at a location of a tensor of some shape; None: the tensor has no such part."""
    try:
        return tuple(location.of(torch.empty(shape, device="meta")).shape)
    except (IndexError, RuntimeError, ValueError):
        return None


class CheckpointSource:
    """A checkpoint folder; only headers are read until tensors are asked for.

    Args:
        model: a folder, a hub id (`org/name`), or a GGUF file.
        revision: of the hub id, which may also stand behind it: `org/name@revision`.

    Raises:
        ModelError: missing, damaged, not safetensors, quantised, an adapter; larger by its configuration than by its
            weights.
        HubError: the hub cannot be reached or does not have it.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.model = str(model)
        self.folder = resolve_model(self.model, revision)
        self.packed: dict[str, Table] = {}  # of each shard, if it is a packed checkpoint
        self.locations: Mapping[str, Location] = {}  # of the model's parameters, by its names; see `naming.py`
        self.configuration = self._read_configuration()
        self.tensors = self._read_headers()
        check_counts(self.configuration, self.model, (info.shape for info in self.tensors.values()))
        files = {"config.json"} | self._shards
        # When each was written, in ns: an unfinished run asks whether it is still the one that it began with.
        self.written = {name: (self.folder / name).stat().st_mtime_ns for name in sorted(files)}

    @property
    def model_type(self) -> str:
        """The configuration's `model_type`."""
        return str(self.configuration.get("model_type", "unknown"))

    def location(self, name: str) -> Location:
        """Where a parameter lies, by the model's name.

        Raises:
            ModelError: the checkpoint does not have it.
        """
        if name not in self.locations:
            raise ModelError(
                f"{self.model} has no tensor {name!r}",
                "the checkpoint is incomplete or of another architecture than its config.json says",
            )
        return self.locations[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, by the model's name.

        Raises:
            ModelError: the checkpoint does not have it, or has a tensor there that has no such part.
        """
        location = self.location(name)
        info = self.tensors[location.tensor]
        shape = shape_of(location, info.shape)
        if shape is None:
            raise ModelError(
                f"{location.tensor} has shape {info.shape}, and no part of it is {name}",
                "config.json and the weights do not belong together",
            )
        return shape

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by the checkpoint's names, each file opened once.

        The tensors are copies: no file stays mapped.

        Raises:
            ModelError: a damaged file, or NaN or Inf in a tensor.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in by_file.items():
            with _OpenedFile(self.folder / file) as handle:
                entries = self.packed[file].packed if file in self.packed else {}
                for name in members:
                    if name in entries:
                        tensor = unpack_tensor(name, entries[name], handle, file)
                    else:
                        tensor = handle.get_tensor(name).clone()
                    if self.tensors[name].dtype in FLOAT_DTYPES and not _all_finite(tensor):
                        raise NotFiniteError(
                            f"{name} in {file} holds NaN or Inf",
                            "the checkpoint is damaged or overflowed when it was converted; get it again",
                        )
                    found[name] = tensor
        return found

    def read_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As `read`, by the model's names of parameters."""
        return self.read_locations({name: self.location(name) for name in names})

    def read_locations(self, locations: Mapping[str, Location]) -> dict[str, Tensor]:
        """As `read`, what lies at some locations, by their names in the mapping."""
        tensors = self.read(dict.fromkeys(location.tensor for location in locations.values()))
        return {name: location.of(tensors[location.tensor]) for name, location in locations.items()}

    def companions(self) -> list[Path]:
        """Configuration, tokenizer, generation and licence files that travel with the weights."""
        return companions(self.folder)

    @property
    def weight_files(self) -> list[Path]:
        """The configuration, the index if there is one, and the shards."""
        indices = (name for name in (INDEX_NAME, PACKED_INDEX) if (self.folder / name).is_file())
        return [self.folder / name for name in sorted({"config.json", *indices, *self._shards})]

    @property
    def key(self) -> str:
        """sha256 that tells the files from which a run makes its output from other files."""
        return files_key({*self.weight_files, *self.companions()})

    @property
    def _shards(self) -> set[str]:
        return {info.file for info in self.tensors.values()}

    def _read_configuration(self) -> dict[str, Any]:
        refuse_adapter(self.folder, self.model)
        path = self.folder / "config.json"
        if not path.exists():
            unfinished = any(self.folder.glob("model-*-of-*.safetensors")) and not (self.folder / INDEX_NAME).exists()
            raise ModelError(
                f"{self.model} has no config.json",
                "the run that wrote it did not finish" if unfinished else "a Hugging Face checkpoint folder is needed",
            )
        configuration = read_json(path)
        refuse_quantised(configuration, self.model)
        return configuration

    @property
    def bytes(self) -> int:
        """Size of all tensors, unpacked."""
        return sum(info.bytes for info in self.tensors.values())

    def _read_packed_headers(self) -> dict[str, TensorInfo]:
        """As `_read_headers`, of a packed checkpoint."""
        weight_map = read_index(self.folder)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(weight_map.values())):
            if not (self.folder / file).is_file():
                raise ModelError(f"shard {file} of {self.model} is missing", "get the checkpoint again, whole")
            with _OpenedFile(self.folder / file) as handle:
                check_header(self.folder / file)
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - a handle
                found = {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
                table = self.packed[file] = read_table(file, handle.metadata(), found)
            for name in (*found, *table.packed):
                self._refuse_repeated(name, tensors, file)
            for name, (dtype, shape) in found.items():
                if not name.endswith((VALUES, PLACES)):
                    tensors[name] = TensorInfo(file, shape, dtype)
            for name, entry in table.packed.items():
                tensors[name] = TensorInfo(file, entry.shape, found[name + VALUES][0])
        if {name: info.file for name, info in tensors.items()} != weight_map:
            raise ModelError(f"{PACKED_INDEX} and the shards of {self.model} do not agree", "get it again, whole")
        extra = {path.name for path in self.folder.glob("packed-*.safetensors")} - set(weight_map.values())
        if extra:
            raise ModelError(f"{PACKED_INDEX} of {self.model} does not know {min(extra)}", "get it again, whole")
        return tensors

    def _read_headers(self) -> dict[str, TensorInfo]:
        if (self.folder / PACKED_INDEX).exists():
            return self._read_packed_headers()
        if (self.folder / INDEX_NAME).exists():
            weight_map = read_json(self.folder / INDEX_NAME, distinct_keys=True).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise ModelError(f"{INDEX_NAME} has no weight_map", "the index is damaged; get it again")
            files = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE_NAME).exists():
            weight_map, files = {}, [SINGLE_NAME]
        else:
            raise ModelError(f"{self.model} has no safetensors weights", self._hint_without_safetensors())
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            check_file_name(file, INDEX_NAME)
            if not (self.folder / file).exists():
                raise ModelError(f"shard {file} of {self.model} is missing", "get the checkpoint again, whole")
            with _OpenedFile(self.folder / file) as handle:
                check_header(self.folder / file)
                for name in handle.keys():  # noqa: SIM118 - a handle, not a dict
                    self._refuse_repeated(name, tensors, file)
                    part = handle.get_slice(name)
                    tensors[name] = TensorInfo(file, tuple(part.get_shape()), str(part.get_dtype()))
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise ModelError(
                    f"{INDEX_NAME} puts {name} into {file}, which does not have it",
                    "the checkpoint is damaged; get it again",
                )
        return tensors

    def _refuse_repeated(self, name: str, tensors: Mapping[str, TensorInfo], file: str) -> None:
        """Raise `ModelError` where a tensor is in a file that was read before, too."""
        if name in tensors:
            raise ModelError(
                f"{self.model} has {name} twice, in {tensors[name].file} and in {file}",
                "it is not known which is the right one: get the checkpoint again, whole",
            )

    def _hint_without_safetensors(self) -> str:
        if any(self.folder.glob("pytorch_model*.bin")):
            return "pickles can run code when opened and are not read: llm-barber convert makes safetensors of them"
        if any(any(self.folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
            return "pickles can run code when opened and are not read: save the model with save_pretrained()"
        if any(self.folder.glob("model-*-of-*.safetensors")):
            return "its index is missing: the run that wrote it did not finish"
        return f"{SINGLE_NAME} or {INDEX_NAME} is needed"


class _OpenedFile:
    """`safe_open` whose complaints name the file and say what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        check_regular(self.path)
        try:
            self.handle: Any = safe_open(os.fspath(self.path), framework="pt")
            return self.handle.__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with suppress(Exception):
            self.handle.__exit__(None, None, None)
        if isinstance(error, SafetensorError):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> ModelError:
        if isinstance(error, FileNotFoundError):  # which safetensors also says of what may not be read
            if self.path.exists():
                return ModelError(f"{self.path} may not be read", "check its permissions: ls -l, chmod")
            return ModelError(f"{self.path} is not there any more", "put it back")
        return ModelError(
            f"{self.path.name} is truncated or not a safetensors file ({error})", "get the file again, whole"
        )


def _all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf, without a mask of the tensor's size: both survive a minimum or maximum."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def sharded_by(names: Iterable[str], sizes: dict[str, TensorInfo], limit: int) -> Iterator[list[str]]:
    """Split names into groups of at most `limit` bytes; a tensor larger than that is a group of its own."""
    group: list[str] = []
    total = 0
    for name in names:
        if group and total + sizes[name].bytes > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += sizes[name].bytes
    if group:
        yield group
