"""Write a packed checkpoint directly: the shards that `pack` makes of a dense checkpoint's shards."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from llm_barber.checkpoint.index import FORMAT_VERSION, PACKED_INDEX, packed_index, packed_name
from llm_barber.checkpoint.packed import pack_tensors, read_tensor
from llm_barber.checkpoint.packed_configuration import CONFIGURATION, packed_configuration
from llm_barber.checkpoint.packed_table import PLACES, TABLE_KEY, VALUES, Table
from llm_barber.checkpoint.writer import CheckpointWriter

METADATA = {"format": "pt"}


def name_format(writer: CheckpointWriter) -> None:
    """Add the entry that names the format to the config.json that was written."""
    plain = (writer.folder / CONFIGURATION).read_bytes()
    writer.write_file(CONFIGURATION, packed_configuration(plain, writer.shard_names))


class PackedWriter(CheckpointWriter):
    """A `CheckpointWriter` of packed shards; its digests are of the files that `unpack` gives."""

    def _name(self, number: int) -> str:
        return packed_name(super()._name(number))

    def _write_shard(
        self,
        number: int,
        tensors: dict[str, Tensor],
        name: str | None,
        metadata: dict[str, str] | None,
        header: str | None,
    ) -> None:
        """Write a shard, durably, with every matrix packed that becomes smaller."""
        assert name is None
        assert metadata is None
        assert header is None
        digest = hashlib.sha256(save(tensors, METADATA)).hexdigest()
        stored, entries = pack_tensors(tensors)
        packed, file = self._name(number), super()._name(number)
        table = Table(version=FORMAT_VERSION, file=file, metadata=METADATA, packed=entries)
        super()._write_shard(number, stored, packed, {TABLE_KEY: table.text()}, None)
        size = sum(tensor.nbytes for tensor in tensors.values())
        unpacked = {"tensors": tuple(tensors), "bytes": size, "file": file, "file_sha256": digest}
        self._written[packed] = self._written[packed].model_copy(update=unpacked)

    def _tensors(self, handle: Any) -> dict[str, Tensor]:
        table = Table.model_validate_json(handle.metadata()[TABLE_KEY])
        tensors = super()._tensors(handle)
        for name in table.packed:
            tensors[name] = read_tensor(name, table, handle, table.file)
            del tensors[name + VALUES], tensors[name + PLACES]
        return tensors

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Copy a companion file; config.json says that the weights are packed, and its digest is of the plain file."""
        super().copy(path, folder, content)
        if path.relative_to(folder).as_posix() == CONFIGURATION:
            name_format(self)

    def finish(self, with_index: bool = True) -> None:
        """Write the packed index and give the folder its name."""
        self.wait_for_shards()
        weight_map = {tensor: name for name, shard in self._written.items() for tensor in shard.tensors}
        self.write_file(PACKED_INDEX, packed_index(weight_map, FORMAT_VERSION))
        super().finish(with_index=False)
