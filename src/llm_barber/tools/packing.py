"""Pack a pruned checkpoint into fewer bytes, and unpack it, shard by shard; both bit for bit."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from llm_barber.checkpoint.companions import CARD_NAME, OWN_JSON, PAGE_NAME
from llm_barber.checkpoint.index import packed_index
from llm_barber.checkpoint.packed import FORMAT_VERSION, PACKED_INDEX, TABLE_KEY, Table, pack_tensors, packed_name
from llm_barber.checkpoint.packed_writer import name_format
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import ModelError
from llm_barber.progress import Progress, Silent
from llm_barber.record.card import card_of_format
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport
from llm_barber.record.verification import folder_problems, refuse, written_otherwise
from llm_barber.settings.copies import PackConfig


class PackReport(BaseModel):
    """Bytes of the weight files before and after, and how many weights are packed in each encoding."""

    model_config = ConfigDict(frozen=True)

    model: str
    output: str
    bytes_before: int
    bytes_after: int
    packed: dict[str, int]
    left_dense: int


def pack(config: PackConfig, progress: Progress | None = None) -> PackReport:
    """Write a packed copy of a checkpoint.

    Raises:
        ModelError: the checkpoint cannot be read, or is packed already.
        VerificationError: the checkpoint differs from its record.
        OutputError: the output cannot be written.
    """
    source = CheckpointSource(config.model)
    if source.packed:
        raise ModelError(f"{config.model} is packed already", "to get the dense files back: llm-barber unpack")
    counts: Counter[str] = Counter()

    def convert(file: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        stored, entries = pack_tensors(tensors)
        counts.update(entry.encoding.value for entry in entries.values())
        with safe_open(source.folder / file, "pt") as handle:
            table = Table(version=FORMAT_VERSION, file=file, metadata=handle.metadata() or {}, packed=entries)
        return packed_name(file), stored, {TABLE_KEY: table.model_dump_json()}

    return _convert(config, source, convert, counts, PACKED_INDEX, "packing", progress or Silent())


def unpack(config: PackConfig, progress: Progress | None = None) -> PackReport:
    """Write the dense copy of a packed checkpoint: the original files, compared with the record.

    Without a record they are not compared.

    Raises:
        ModelError: the checkpoint is not packed, or damaged.
        VerificationError: the unpacked files differ from the record.
        OutputError: the output cannot be written.
    """
    source = CheckpointSource(config.model)
    if not source.packed:
        raise ModelError(f"{config.model} is not packed", "give a folder that llm-barber pack wrote")
    counts = Counter(entry.encoding.value for table in source.packed.values() for entry in table.packed.values())

    def convert(file: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        table = source.packed[file]
        return table.file, dict(tensors), table.metadata

    return _convert(config, source, convert, counts, None, "unpacking", progress or Silent())


def _convert(
    config: PackConfig,
    source: CheckpointSource,
    convert: Callable[[str, Mapping[str, Tensor]], tuple[str, dict[str, Tensor], dict[str, str]]],
    counts: Counter[str],
    index: str | None,
    title: str,
    progress: Progress,
) -> PackReport:
    """Write a copy shard by shard, each converted by `convert` to its file name, tensors and metadata.

    `index`: file name of the index to write; None: the copy is dense. `title`: of the progress bar. `counts` has the
    number of packed weights of each encoding when all shards are converted.
    """
    files = list(dict.fromkeys(info.file for info in source.tensors.values()))
    before = sum((source.folder / file).stat().st_size for file in files)
    needed = source.bytes if index is None else before
    record = read_record(source.folder)
    if record is not None and index is not None:
        refuse(source.model, folder_problems(source, record, progress))
    with CheckpointWriter(config.output, len(files), config.overwrite, needed) as writer:
        progress.start(title, len(files))
        for file in files:
            tensors = source.read([name for name, info in source.tensors.items() if info.file == file])
            name, stored, metadata = convert(file, tensors)
            writer.write_shard(stored, name, metadata)
            progress.advance(name)
        for path in source.companions():
            writer.copy(path, source.folder)
        for name in (*OWN_JSON, PAGE_NAME):
            if (source.folder / name).is_file():
                writer.copy(source.folder / name, source.folder)
        if record is not None and index is None:
            refuse(source.model, written_otherwise(writer.digests, record))
        _copy_card(source.folder, record, "dense" if index is None else "packed", writer)
        if index is not None:
            name_format(writer)
            weight_map = {name: packed_name(info.file) for name, info in source.tensors.items()}
            writer.write_file(index, packed_index(weight_map))
        after = sum((writer.folder / shard).stat().st_size for shard in writer.shard_names)
        writer.finish(with_index=index is None)
    return PackReport(
        model=config.model, output=str(config.output), bytes_before=before, bytes_after=after, packed=dict(counts),
        left_dense=sum(len(info.shape) in (2, 3) for info in source.tensors.values()) - counts.total(),
    )  # fmt: skip


def _copy_card(folder: Path, record: RunReport | None, stored: str, writer: CheckpointWriter) -> None:
    """Copy the model card; in a card of this program, as a record proves, replace the format of storage."""
    card = folder / CARD_NAME
    if not card.is_file():
        return
    content = card.read_bytes()
    if record is not None:
        with suppress(UnicodeDecodeError):  # a card that the user wrote is copied as it is
            content = card_of_format(content.decode("utf-8"), record, stored).encode()
    writer.write_file(CARD_NAME, content)
