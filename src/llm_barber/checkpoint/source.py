"""Read a checkpoint tensor by tensor: a local folder with safetensors, a hub id, or a GGUF file.

Nothing is unpickled, and no code that comes with a model is run. What an index says is checked against the files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_barber.checkpoint.channel_order import ChannelOrder
from llm_barber.checkpoint.companions import companions, refuse_adapter, refuse_quantised
from llm_barber.checkpoint.counts import check_counts
from llm_barber.checkpoint.digests import files_key
from llm_barber.checkpoint.encoding import Packed
from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME, resolve_model
from llm_barber.checkpoint.locations import FLOAT_DTYPES, Location, shape_of
from llm_barber.checkpoint.memory import Memory, copied, ordinary_memory
from llm_barber.checkpoint.packed import read_packed, read_tensor
from llm_barber.checkpoint.packed_format import DAMAGED, KEY, PACKED_INDEX, names_packed
from llm_barber.checkpoint.rounding import Rounded
from llm_barber.checkpoint.shards import ShardFile, read_headers
from llm_barber.checkpoint.untrusted import read_json
from llm_barber.errors import ModelError, NotFiniteError

READ_OPEN = 1 << 28  # bytes; pages of a mapped file count as the process's memory


class CheckpointSource:
    """A checkpoint folder; only headers are read until tensors are asked for.

    Args:
        model: a folder, a hub id (`org/name`), or a GGUF file.
        revision: of the hub id, which may also stand behind it: `org/name@revision`.

    Raises:
        ModelError: the model is missing, damaged, not safetensors, quantised or an adapter, or larger by its
            configuration than by its weights.
        HubError: the hub cannot be reached or does not have the model.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.model = str(model)
        self.folder = resolve_model(self.model, revision)
        self.locations: Mapping[str, Location] = {}  # of the model's parameters, by its names; see `naming.py`
        self.configuration = self._read_configuration()
        self.tensors, self.packed = read_headers(self.folder, self.model)
        check_counts(self.configuration, self.model, (info.shape for info in self.tensors.values()))
        self._order: ChannelOrder | None = None
        self._last: ShardFile | None = None
        self._keeps_open = False
        files = {"config.json", *self.shards}
        # Modification times, ns: an unfinished run asks whether each file is still the one that it began with.
        self.written = {name: (self.folder / name).stat().st_mtime_ns for name in sorted(files)}

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
        if names_packed(configuration):
            if not (self.folder / PACKED_INDEX).exists():
                raise ModelError(
                    f"{self.model} has no {PACKED_INDEX}, though its config.json says that it is packed", DAMAGED
                )
            del configuration[KEY]  # what follows is the model's, however it is stored
        return configuration

    @property
    def model_type(self) -> str:
        """The configuration's `model_type`."""
        return str(self.configuration.get("model_type", "unknown"))

    @property
    def bytes(self) -> int:
        """Size of all tensors, unpacked."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def order(self) -> ChannelOrder | None:
        """The order in which `read` gives channels; None: as the files have them.

        Raises:
            ModelError: set to an order of other tensors.
        """
        return self._order

    @order.setter
    def order(self, order: ChannelOrder | None) -> None:
        if order is not None:
            order.check(self.tensors, self.model)
        self._order = order

    def location(self, name: str) -> Location:
        """The location of a parameter, by the model's name.

        Raises:
            ModelError: the checkpoint does not have the parameter.
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
            ModelError: the checkpoint does not have the parameter, or its tensor has no such part.
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

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep the shard that was read last open inside a `with` statement: opening takes a millisecond.

        A shard is opened anew after some 256 MiB: pages of an open file count as this process's memory.
        """
        self._keeps_open = True
        try:
            yield
        finally:
            self._keeps_open, self._last = False, None

    def _shard(self, file: str) -> ShardFile:
        last = self._last
        if last is None or last.path.name != file or last.bytes >= READ_OPEN:
            self._last = None  # closed before the next one is opened
            last = ShardFile(self.folder / file)
        if self._keeps_open:
            self._last = last
        return last

    def metadata(self, file: str) -> dict[str, str]:
        """Metadata of the header of a shard; errors as of `read`."""
        return self._shard(file).metadata

    def members(self, file: str) -> list[str]:
        """Names of the tensors in a shard."""
        return [name for name, info in self.tensors.items() if info.file == file]

    def read(self, names: Iterable[str], memory: Memory = ordinary_memory) -> dict[str, Tensor]:
        """Read tensors by the checkpoint's names, each file opened once.

        The tensors are copies in `memory`: no file stays mapped.

        Raises:
            ModelError: a file is damaged, or a tensor holds NaN or Inf.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, members in by_file.items():
            shard, table = self._shard(file), self.packed.get(file)
            for name in members:
                if table is None:
                    tensor = copied(self._in_order(name, shard.read(name)), memory)
                else:
                    tensor = self._in_order(name, read_tensor(name, table, shard, memory))
                self._refuse_not_finite(name, tensor)
                tensors[name] = tensor
        return tensors

    def _in_order(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self._order is None else self._order.apply(name, tensor)

    def _refuse_not_finite(self, name: str, values: Tensor) -> None:
        info = self.tensors[name]
        if info.dtype in FLOAT_DTYPES and not _all_finite(values):
            raise NotFiniteError(
                f"{name} in {self.folder / info.file} holds NaN or Inf",
                "the checkpoint is damaged or overflowed when it was converted; get it again",
            )

    def read_parameters(self, names: Iterable[str], memory: Memory = ordinary_memory) -> dict[str, Tensor]:
        """Read parameters by the model's names; errors as of `read` and `location`."""
        return self.read_locations({name: self.location(name) for name in names}, memory)

    def read_packed(self, name: str, memory: Memory = ordinary_memory) -> Packed | Rounded | None:
        """Read a matrix as its shard packs it, with a bit mask; None: no shard has it as a packed matrix.

        `name` is the model's; values, bits and scales are copies in `memory`, but for bits that are decoded; errors as
        of `read` and `location`.
        """
        location = self.location(name)
        file = self.tensors[location.tensor].file
        table = self.packed.get(file)
        entry = table.packed.get(location.tensor) if table is not None else None
        if table is None or entry is None or len(entry.shape) != 2 or location.part is not None:
            return None
        packed = read_packed(location.tensor, table, self._shard(file), memory)
        if isinstance(packed, Packed):
            self._refuse_not_finite(location.tensor, packed.values)
        return packed

    def read_locations(self, locations: Mapping[str, Location], memory: Memory = ordinary_memory) -> dict[str, Tensor]:
        """Read the parameters at some locations, by their names in the mapping; errors as of `read`.

        `memory`: for the tensors, of which parameters may be parts.
        """
        tensors = self.read(dict.fromkeys(location.tensor for location in locations.values()), memory)
        return {name: location.of(tensors[location.tensor]) for name, location in locations.items()}

    def companions(self) -> list[Path]:
        """Configuration, tokenizer, generation and licence files that travel with the weights."""
        return companions(self.folder)

    @property
    def weight_files(self) -> list[Path]:
        """The configuration, the index if it is read, and the shards."""
        read = (PACKED_INDEX,) if (self.folder / SINGLE_NAME).exists() else (INDEX_NAME, PACKED_INDEX)
        indices = (name for name in read if (self.folder / name).is_file())
        return [self.folder / name for name in sorted({"config.json", *indices, *self.shards})]

    @property
    def key(self) -> str:
        """sha256 of the files from which a run makes its output (`files_key`)."""
        return files_key({*self.weight_files, *self.companions()})

    @property
    def shards(self) -> list[str]:
        """Names of the files that have the tensors."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))


def _all_finite(tensor: Tensor) -> bool:
    """True if no element is NaN or Inf.

    Both survive a minimum and a maximum: no mask of the tensor's size is made.
    """
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())
