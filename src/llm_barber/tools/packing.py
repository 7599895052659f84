"""Pack a pruned checkpoint into fewer bytes, and unpack it, shard by shard.

Both keep every bit of every tensor, unless kept weights are rounded (`rounded_packing.py`).
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llm_barber.checkpoint.companions import CARD_NAME, EVALUATION_NAME, PAGE_NAME, RECORD_NAME
from llm_barber.checkpoint.packed import Packing
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import ModelError, SettingsError
from llm_barber.progress import Progress, Silent
from llm_barber.record.card import card_of_format
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport
from llm_barber.record.rounding import Rounding, rounding_of
from llm_barber.record.verification import folder_problems, refuse
from llm_barber.settings.base import takes
from llm_barber.settings.tools import PackConfig, UnpackConfig, Values
from llm_barber.tools.rounded_packing import Rounder, refuse_unpruned


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
        report = _copy(config, source, record, Packing(), progress)
        if not report.packed:
            progress.warn(f"{config.model} has no matrix that packing makes smaller: is it pruned?")
        return report
    refuse_unpruned(source, record, progress)
    rounder = Rounder(source, record, progress)
    report = _copy(config, source, record, rounder.packing, progress, rounder.amended)
    return report.model_copy(update={"rounding": rounder.rounding})


@takes(UnpackConfig)
def unpack(config: UnpackConfig, progress: Progress | None = None) -> PackReport:
    """Write the dense copy of a packed checkpoint, after comparing the checkpoint with its record.

    It has the tensors that were packed, bit for bit, unless their kept weights were rounded. Without a record nothing
    is compared.

    Raises:
        ModelError: the checkpoint is not packed, or damaged.
        VerificationError: the checkpoint differs from its record.
        OutputError: the output cannot be written.
        SettingsError: the settings are those of packing with rounded values.
    """
    if isinstance(config, PackConfig) and config.values is not Values.EXACT:
        raise SettingsError("values are a setting of pack alone", "unpack knows from the files what they are")
    source = CheckpointSource(config.model)
    if not source.packed:
        raise ModelError(f"{config.model} is not packed", "give a folder that llm-barber pack wrote")
    report = _copy(config, source, read_record(source.folder), None, progress or Silent())
    return report.model_copy(update={"rounding": rounding_of(source)})


def _copy(
    config: UnpackConfig,
    source: CheckpointSource,
    record: RunReport | None,
    packing: Packing | None,
    progress: Progress,
    amended: Callable[[RunReport], RunReport] = lambda record: record,
) -> PackReport:
    """Write a copy shard by shard; `packing` None: unpacked; `amended`: the copy's record once all are written."""
    if record is not None:
        refuse(source.model, folder_problems(source, record, progress))
    before = sum((source.folder / file).stat().st_size for file in source.shards)
    needed = source.bytes if packing is None else before
    with CheckpointWriter(config.output, len(source.shards), config.overwrite, needed, packing=packing) as writer:
        progress.start("packing" if packing else "unpacking", len(source.shards))
        for file in source.shards:
            table = source.packed.get(file)
            name, metadata = (file, source.metadata(file)) if table is None else (table.file, table.metadata)
            writer.write_shard(source.read(source.members(file)), name, metadata)
            writer.wait_for_shards()
            progress.advance(name)
        for path in source.companions():
            writer.copy(path, source.folder)
        after_record = record and amended(record).model_copy(update={"files": writer.digests})
        stored = "dense" if packing is None else "rounded" if packing.rounds else "packed"
        _write_record(source.folder, record, after_record, stored, writer)
        after = sum((writer.folder / shard).stat().st_size for shard in writer.shard_names)
        writer.finish()
    unpacked = (entry for table in source.packed.values() for entry in table.packed.values())
    entries = unpacked if packing is None else packing.entries.values()
    counts = Counter(entry.encoding.value for entry in entries)
    return PackReport(
        model=config.model, output=str(config.output), bytes_before=before, bytes_after=after, packed=dict(counts),
        left_dense=sum(len(info.shape) in (2, 3) for info in source.tensors.values()) - counts.total(),
    )  # fmt: skip


def _write_record(
    folder: Path, before: RunReport | None, after: RunReport | None, stored: str, writer: CheckpointWriter
) -> None:
    """Write the record, the page, the evaluation and the card of a copy; `stored`: a key of `STORED` of the card.

    The page of a rounded model is made anew, and the evaluation of the model before is left out.
    """
    texts = {name: (folder / name).read_bytes() for name in (CARD_NAME, PAGE_NAME) if (folder / name).is_file()}
    if before is None or after is None or before.rounding == after.rounding:
        if (folder / EVALUATION_NAME).is_file():
            writer.write_file(EVALUATION_NAME, (folder / EVALUATION_NAME).read_bytes())
    elif PAGE_NAME in texts:
        from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

        texts[PAGE_NAME] = run_page(after).encode()
    if before is not None and after is not None:
        texts[RECORD_NAME] = after.to_json().encode()
        if CARD_NAME in texts:
            with suppress(UnicodeDecodeError):  # a card that the user wrote is copied as it is
                texts[CARD_NAME] = card_of_format(texts[CARD_NAME].decode("utf-8"), before, after, stored).encode()
    for name, content in texts.items():
        writer.write_file(name, content)
