"""Verify a folder against its record: every file on which a loaded model depends, by its digest."""

import hashlib
from pathlib import Path

from safetensors.torch import save

from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder, read_order
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.hub import CHAT_TEMPLATES, INDEX_NAME
from llm_barber.checkpoint.packed_format import CONFIGURATION, PACKED_INDEX, plain_configuration
from llm_barber.checkpoint.replacing import folder_entries, is_program_file
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, VerificationError
from llm_barber.progress import Progress
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport
from llm_barber.record.rounding import rounding_of

# Entries that version control and the hub's client leave in a folder; no program loads a model from them.
HUB_ENTRIES = {".gitattributes", ".git", ".cache"}


def changed_files(source: CheckpointSource, record: RunReport, progress: Progress) -> list[str]:
    """Sentences about the files of the record that are missing or changed.

    Raises:
        ModelError: a shard that an earlier program packed cannot be unpacked.
    """
    progress.start("checking files", len(record.files))
    unpacked = _unpacked_digests(source, record)
    problems = []
    for name, digest in record.files.items():
        actual = unpacked[name] if name in unpacked else _file_digest(source.folder, name)
        if actual is None:
            problems.append(f"{name} is in the record, not in the folder")
        elif actual != digest:
            problems.append(f"{name} has changed since it was written (sha256)")
        progress.advance(name)
    return problems


def unknown_files(source: CheckpointSource, record: RunReport) -> list[str]:
    """Sentences about the files of the folder that neither the record names nor this program writes.

    The model card, the page, the evaluation and the record itself are allowed: no loaded model depends on them.
    """
    expected_names = {*record.files, *HUB_ENTRIES}
    if _names_unpacked_files(source, record):
        expected_names |= {*source.packed, PACKED_INDEX}
    return [
        f"{name} is in the folder, not in the record"
        for name in sorted(path.relative_to(source.folder).as_posix() for path in folder_entries(source.folder))
        if name not in expected_names and not is_program_file(name)
    ]


def _names_unpacked_files(source: CheckpointSource, record: RunReport) -> bool:
    """True for the record of a packed folder by an earlier program: it names the files that the folder unpacks to."""
    return bool(source.packed) and record.files.keys().isdisjoint(source.packed)


def _unpacked_digests(source: CheckpointSource, record: RunReport) -> dict[str, str | None]:
    """sha256 of the files that a folder unpacks to, one in memory at a time, if its record names those.

    The record's own digest stands for files that cannot be made again: the index, whose content was compared with the
    shards, and shards whose header safetensors writes otherwise.
    """
    if not _names_unpacked_files(source, record):
        return {}
    digests: dict[str, str | None] = {INDEX_NAME: record.files.get(INDEX_NAME)}
    for file, table in source.packed.items():
        digests[table.file] = record.files.get(table.file)
        if table.header is None:
            content = save(source.read(source.members(file)), dict(table.metadata))
            digests[table.file] = hashlib.sha256(content).hexdigest()
    path = source.folder / CONFIGURATION
    digests[CONFIGURATION] = hashlib.sha256(plain_configuration(path.read_bytes())).hexdigest()
    return digests


def recorded_order(source: CheckpointSource, record: RunReport | None) -> ChannelOrder | None:
    """The order of a checkpoint's channels; None: they are where the dense model has them.

    Raises:
        ModelError: the file is damaged, or is not the one that the record names.
    """
    order = read_order(source.folder)
    expected = None if record is None else record.files.get(ORDER_NAME)
    if expected is not None and _file_digest(source.folder, ORDER_NAME) != expected:
        raise ModelError(
            f"{ORDER_NAME} of {source.model} is missing or was changed: nothing else says where its channels are",
            "copy it from where the checkpoint was pruned, or prune again",
        )
    return order


def verify_folder(source: CheckpointSource, progress: Progress) -> None:
    """Refuse a folder that does not agree with its record, or that has no record.

    Raises:
        ModelError: the record is missing or was changed.
        VerificationError: a file is missing, changed or unknown.
    """
    record = read_record(source.folder)
    if record is None:
        raise ModelError(f"{source.model} has no {RECORD_NAME}, so that nothing can be verified", "load it unverified")
    refuse(source.model, folder_problems(source, record, progress))


def folder_problems(source: CheckpointSource, record: RunReport, progress: Progress) -> list[str]:
    """Sentences about the files that are missing, changed or unknown."""
    rounding = rounding_of(source)
    other_rounding = [] if rounding in (None, record.rounding) else ["the tables have another rounding than the record"]
    return [*changed_files(source, record, progress), *unknown_files(source, record), *other_rounding]


def refuse(model: str, problems: list[str]) -> None:
    """Raise `VerificationError` with the first problems of a folder, if there are any."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise VerificationError(
            f"{model} is not what {RECORD_NAME} says: {'; '.join(problems[:3])}{more}",
            f"get it again; if you changed it on purpose, remove {RECORD_NAME}, which does not fit any more",
        )


def _file_digest(folder: Path, name: str) -> str | None:
    """sha256 of a file of the folder; None: it is missing, or outside the folder."""
    path = folder / name
    if path.parent not in (folder, folder / CHAT_TEMPLATES) or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
