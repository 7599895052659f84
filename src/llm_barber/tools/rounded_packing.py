"""Pack a pruned checkpoint with its kept weights rounded to int8: another model, and its record says so."""

from collections import Counter
from collections.abc import Mapping

from safetensors import safe_open
from torch import Tensor

from llm_barber.checkpoint.dense_files import dense_digest, header_to_keep
from llm_barber.checkpoint.index import ROUNDED_VERSION, packed_name
from llm_barber.checkpoint.packed import can_be_rounded, pack_tensor_rounded
from llm_barber.checkpoint.packed_table import TABLE_KEY, RoundedEntry, RoundedTable, StoredTensor, tensor_digest
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.progress import Progress
from llm_barber.record.file import recorded_structure
from llm_barber.record.layers import LayerResult, LinearResult
from llm_barber.record.report import RunReport
from llm_barber.record.rounding import Rounding
from llm_barber.tools.linears import FoundLinear, find_linears

PART_DTYPES = ("I8", "U8", "BF16")  # of values, places and scales


def refuse_unpruned(source: CheckpointSource, record: RunReport | None, progress: Progress) -> None:
    """Refuse to round a checkpoint without a pruned matrix, or one that is rounded already.

    A pruned checkpoint is known by its first linear; a dense one is read whole.

    Raises:
        ModelError: it is not pruned, or its record says that it is rounded.
    """
    if record is not None and record.rounding is not None:
        raise ModelError(
            f"the kept weights of {source.model} are rounded already, and rounding again would add errors",
            "pack it without --values int8, or start from the model that was rounded",
        )
    # Linears are smaller than the embedding, which is rarely pruned.
    matrices = sorted((info.bytes, name) for name, info in source.tensors.items() if len(info.shape) in (2, 3))
    progress.start("looking for pruned weights", len(matrices))
    for _, name in matrices:
        if can_be_rounded(source.read([name])[name]):
            return
        progress.advance(name)
    raise ModelError(
        f"no matrix of {source.model} is pruned, and only kept weights of pruned ones are rounded",
        "prune it first: llm-barber prune; to quantise a dense model take a program for that, such as llama.cpp",
    )


def dense_header(
    source: CheckpointSource, file: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], str | None]:
    """Metadata of a dense file, and its header if safetensors would write another.

    Args:
        source: the dense checkpoint.
        file: the file's name.
        tensors: all tensors of the file.
    """
    path = source.folder / file
    with safe_open(path, "pt") as handle:
        metadata: dict[str, str] = handle.metadata() or {}
    return metadata, header_to_keep(path, {name: source.tensors[name] for name in tensors}, tensors, metadata)


class Rounder:
    """Packs shards with rounded values, and keeps what the record needs of them.

    Args:
        source: the checkpoint.
        record: its record; None: it has none, and nothing is kept.
        progress: told of warnings.
    """

    def __init__(self, source: CheckpointSource, record: RunReport | None, progress: Progress) -> None:
        self._source = source
        self._linears: Mapping[str, list[FoundLinear]] = {}
        if record is not None:
            self._linears = find_linears(source, recorded_structure(record), record.prunes_head, progress)
        self._with_record = record is not None
        self._entries: dict[str, RoundedEntry] = {}
        self._digests: dict[str, str] = {}
        self._zeros: dict[tuple[int, str], int] = {}
        self.counts: Counter[str] = Counter()

    @property
    def rounding(self) -> Rounding:
        """The rounding of the shards so far."""
        group = max(entry.group for entry in self._entries.values())
        return Rounding(group=group, errors={name: entry.error for name, entry in self._entries.items()})

    def convert(self, file: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str], None]:
        """Pack a shard: the name, tensors and metadata to write. `tensors` are taken out."""
        metadata, header = dense_header(self._source, file, tensors)
        stored: dict[str, Tensor] = {}
        listed: dict[str, StoredTensor] = {}
        entries: dict[str, RoundedEntry] = {}
        restored: dict[str, Tensor] = {}
        for name in list(tensors):
            parts, entry, tensor = pack_tensor_rounded(name, tensors.pop(name))
            stored |= parts
            dtypes = (self._source.tensors[name].dtype,) if entry is None else PART_DTYPES
            for (part_name, part), dtype in zip(parts.items(), dtypes, strict=True):
                shape = tuple(part.shape)
                listed[part_name] = StoredTensor(dtype=dtype, shape=shape, sha256=tensor_digest(part))
            if entry is not None:
                entries[name] = entry
            if self._with_record:
                restored[name] = tensor
                self._count_zeros(name, tensor)
        self._entries |= entries
        self.counts.update(entry.encoding.value for entry in entries.values())
        if self._with_record:
            self._digests[file] = dense_digest(restored, metadata, header)
        table = RoundedTable(
            version=ROUNDED_VERSION, file=file, metadata=metadata, header=header, packed=entries, tensors=listed
        )
        return packed_name(file), stored, {TABLE_KEY: table.text()}, None

    def _count_zeros(self, name: str, tensor: Tensor) -> None:
        for linear in self._linears.get(name, []):
            if not linear.alias:
                self._zeros[linear.layer, linear.name] = int((linear.weight(tensor) == 0).sum())

    def amend(self, record: RunReport) -> RunReport:
        """The record of the rounded model: its files as they unpack, its zeros, and the rounding."""
        return record.model_copy(
            update={
                "files": record.files | self._digests,
                "layers": tuple(self._amended(layer) for layer in record.layers),
                "rounding": self.rounding,
            }
        )

    def _amended(self, layer: LayerResult) -> LayerResult:
        def amended(linear: LinearResult) -> LinearResult:
            return linear.model_copy(update={"zeros": self._zeros.get((layer.index, linear.name), linear.zeros)})

        blocks = [
            block.model_copy(update={"linears": tuple(amended(linear) for linear in block.linears)})
            for block in layer.blocks
        ]
        return layer.model_copy(update={"blocks": tuple(blocks)})
