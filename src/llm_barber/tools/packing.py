"""Pack a pruned checkpoint into fewer bytes, and unpack it, shard by shard.

Both keep every bit, unless kept weights are rounded (`rounded_packing.py`).
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llm_barber.checkpoint.companions import CARD_NAME, EVALUATION_NAME, PAGE_NAME, RECORD_NAME
from llm_barber.checkpoint.index import FORMAT_VERSION, PACKED_INDEX, ROUNDED_VERSION, packed_index, packed_name
from llm_barber.checkpoint.packed import pack_tensors
from llm_barber.checkpoint.packed_table import TABLE_KEY, Table
from llm_barber.checkpoint.packed_writer import name_format
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import ModelError, SettingsError
from llm_barber.progress import Progress, Silent
from llm_barber.record.card import card_of_format
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport
from llm_barber.record.rounding import Rounding, rounding_of
from llm_barber.record.verification import folder_problems, refuse, written_otherwise
from llm_barber.settings.base import takes
from llm_barber.settings.tools import PackConfig, UnpackConfig, Values
from llm_barber.tools.rounded_packing import Rounder, dense_header, refuse_unpruned

# A shard to write: its name, tensors and metadata, and its header if safetensors would write another.
Written = tuple[str, dict[str, Tensor], dict[str, str], str | None]


class PackReport(BaseModel):
    """Bytes of the weight files before and after, and how many weights are packed in each encoding.

    `rounding`: of the kept weights; None: they are exact.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    output: str
    bytes_before: int
    bytes_after: int
    packed: dict[str, int]
    left_dense: int
    rounding: Rounding | None = None


@dataclass
class Conversion:
    """A copy of a checkpoint in another format.

    `title`: of the progress bar. `stored`: the format, a key of `STORED` of the model card. `version`: of the packed
    format; None: the copy is dense. `convert`: makes a shard of the copy from a shard's name and tensors, which it may
    take out. `counts`: packed weights of each encoding, once all shards are converted. `amend`: makes the copy's
    record, once all shards are converted.
    """

    title: str
    stored: str
    version: int | None
    convert: Callable[[str, dict[str, Tensor]], Written]
    counts: Counter[str] = field(default_factory=Counter)
    amend: Callable[[RunReport], RunReport] = lambda record: record


@takes(PackConfig)
def pack(config: PackConfig, progress: Progress | None = None) -> PackReport:
    """Write a packed copy of a checkpoint.

    Raises:
        ModelError: the checkpoint cannot be read, is packed already, or is not pruned although it is to be rounded.
        VerificationError: the checkpoint differs from its record.
        OutputError: the output cannot be written.
    """
    progress = progress or Silent()
    source = CheckpointSource(config.model)
    if source.packed:
        raise ModelError(f"{config.model} is packed already", "to get the dense files back: llm-barber unpack")
    record = read_record(source.folder)
    if config.values is Values.EXACT:
        report = _convert(config, source, record, _exact(source), progress)
        if not report.packed:
            progress.warn(f"{config.model} has no matrix that packing makes smaller: is it pruned?")
        return report
    refuse_unpruned(source, record, progress)
    rounder = Rounder(source, record, progress)
    conversion = Conversion("packing", "rounded", ROUNDED_VERSION, rounder.convert, rounder.counts, rounder.amend)
    report = _convert(config, source, record, conversion, progress)
    return report.model_copy(update={"rounding": rounder.rounding})


def _exact(source: CheckpointSource) -> Conversion:
    """Packing without rounding."""
    counts: Counter[str] = Counter()

    def convert(file: str, tensors: dict[str, Tensor]) -> Written:
        stored, entries = pack_tensors(tensors)
        counts.update(entry.encoding.value for entry in entries.values())
        metadata, header = dense_header(source, file, tensors)
        table = Table(version=FORMAT_VERSION, file=file, metadata=metadata, header=header, packed=entries)
        return packed_name(file), stored, {TABLE_KEY: table.text()}, None

    return Conversion("packing", "packed", FORMAT_VERSION, convert, counts)


@takes(UnpackConfig)
def unpack(config: UnpackConfig, progress: Progress | None = None) -> PackReport:
    """Write the dense copy of a packed checkpoint, compared with the record.

    It has the files that were packed, unless their kept weights were rounded. Without a record nothing is compared.

    Raises:
        ModelError: the checkpoint is not packed, or damaged.
        VerificationError: the unpacked files differ from the record.
        OutputError: the output cannot be written.
        SettingsError: the settings are those of packing with rounded values.
    """
    if isinstance(config, PackConfig) and config.values is not Values.EXACT:
        raise SettingsError("values are a setting of pack alone", "unpack knows from the files what they are")
    source = CheckpointSource(config.model)
    if not source.packed:
        raise ModelError(f"{config.model} is not packed", "give a folder that llm-barber pack wrote")
    counts = Counter(entry.encoding.value for table in source.packed.values() for entry in table.packed.values())

    def convert(file: str, tensors: dict[str, Tensor]) -> Written:
        table = source.packed[file]
        return table.file, tensors, table.metadata, table.header

    conversion = Conversion("unpacking", "dense", None, convert, counts)
    report = _convert(config, source, read_record(source.folder), conversion, progress or Silent())
    return report.model_copy(update={"rounding": rounding_of(source)})


def _convert(
    config: UnpackConfig, source: CheckpointSource, record: RunReport | None, conversion: Conversion, progress: Progress
) -> PackReport:
    """Write a copy shard by shard."""
    files = list(dict.fromkeys(info.file for info in source.tensors.values()))
    before = sum((source.folder / file).stat().st_size for file in files)
    version = conversion.version
    if record is not None and version is not None:
        refuse(source.model, folder_problems(source, record, progress))
    needed = source.bytes if version is None else before
    with CheckpointWriter(config.output, len(files), config.overwrite, needed) as writer:
        progress.start(conversion.title, len(files))
        for file in files:
            tensors = source.read([name for name, info in source.tensors.items() if info.file == file])
            name, stored, metadata, header = conversion.convert(file, tensors)
            writer.write_shard(stored, name, metadata, header)
            writer.wait_for_shards()
            progress.advance(name)
        for path in source.companions():
            writer.copy(path, source.folder)
        amended = None if record is None else conversion.amend(record)
        _write_record(source.folder, record, amended, writer)
        if record is not None and version is None:
            refuse(source.model, written_otherwise(writer.digests, record))
        _copy_card(source.folder, record, amended, conversion.stored, writer)
        if version is not None:
            name_format(writer)
            weight_map = {name: packed_name(info.file) for name, info in source.tensors.items()}
            writer.write_file(PACKED_INDEX, packed_index(weight_map, version))
        after = sum((writer.folder / shard).stat().st_size for shard in writer.shard_names)
        writer.finish(with_index=version is None)
    counts = conversion.counts
    return PackReport(
        model=config.model, output=str(config.output), bytes_before=before, bytes_after=after, packed=dict(counts),
        left_dense=sum(len(info.shape) in (2, 3) for info in source.tensors.values()) - counts.total(),
    )  # fmt: skip


def _write_record(folder: Path, record: RunReport | None, amended: RunReport | None, writer: CheckpointWriter) -> None:
    """Copy the record, the evaluation and the page, or write the record and the page of a changed model."""
    if amended is record or amended is None:
        for name in (RECORD_NAME, EVALUATION_NAME, PAGE_NAME):
            if (folder / name).is_file():
                writer.copy(folder / name, folder)
        return
    writer.write_file(RECORD_NAME, amended.to_json().encode())
    if (folder / PAGE_NAME).is_file():
        from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

        writer.write_file(PAGE_NAME, run_page(amended).encode())


def _copy_card(
    folder: Path, record: RunReport | None, amended: RunReport | None, stored: str, writer: CheckpointWriter
) -> None:
    """Copy the model card; in a card of this program, as a record proves, replace sentences that changed."""
    card = folder / CARD_NAME
    if not card.is_file():
        return
    content = card.read_bytes()
    if record is not None and amended is not None:
        with suppress(UnicodeDecodeError):  # a card that the user wrote is copied as it is
            content = card_of_format(content.decode("utf-8"), record, amended, stored).encode()
    writer.write_file(CARD_NAME, content)
