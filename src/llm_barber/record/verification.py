"""Verify a folder against its record: every file on which a loaded model depends, by its digest."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder, read_order
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.dense_files import dense_digest
from llm_barber.checkpoint.hub import CHAT_TEMPLATES, INDEX_NAME
from llm_barber.checkpoint.index import FORMAT_VERSION, PACKED_INDEX, dense_index, packed_index
from llm_barber.checkpoint.packed_configuration import CONFIGURATION, packed_configuration, plain_configuration
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

    Packed shards are unpacked in memory, one at a time: the record has the digests of the files that they unpack to.

    Raises:
        ModelError: a packed shard cannot be unpacked.
    """
    progress.start("checking files", len(record.files))
    packed = {table.file: file for file, table in source.packed.items()}
    problems = []
    if len(packed) < len(source.packed):
        problems.append(f"two shards of {PACKED_INDEX} name the same dense file")
    for name, digest in record.files.items():
        actual = _unpacked_digest(source, name, packed) if source.packed else None
        if actual is None:
            actual = _file_digest(source.folder, name)
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
    expected_names = {*record.files, *source.packed, *([PACKED_INDEX] if source.packed else [])}
    problems = [
        f"{name} is in the folder, not in the record"
        for name in sorted(path.relative_to(source.folder).as_posix() for path in folder_entries(source.folder))
        if name not in expected_names and name not in HUB_ENTRIES and not is_program_file(name)
    ]
    index = source.folder / PACKED_INDEX
    if index.exists():
        version = next(iter(source.packed.values())).version if source.packed else FORMAT_VERSION
        expected = packed_index({name: info.file for name, info in source.tensors.items()}, version)
        if index.read_bytes() != expected:
            problems.append(f"{PACKED_INDEX} has changed since it was written")
        configuration = (source.folder / CONFIGURATION).read_bytes()
        plain = plain_configuration(configuration)  # earlier programs left it so
        if configuration not in (plain, packed_configuration(plain, source.packed)):
            problems.append(f"{CONFIGURATION} has changed since it was written")
        problems += [
            f"{file} was packed from {table.file}, which is not in the record"
            for file, table in source.packed.items()
            if table.file not in record.files
        ]
        if (source.folder / INDEX_NAME).exists():
            problems.append(f"{INDEX_NAME} is in the folder of a packed model")
    return problems


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


def written_otherwise(written: Mapping[str, str], record: RunReport) -> list[str]:
    """Sentences about the differences between the written files, sha256 by name, and the record's."""
    missing = [f"{name} is in the record, not in the folder" for name in record.files.keys() - written.keys()]
    unknown = [
        f"{name} is in the folder, not in the record"
        for name in written.keys() - record.files.keys()
        if not is_program_file(name)
    ]
    changed = [
        f"{name} has changed since it was packed (sha256)"
        for name, digest in record.files.items()
        if written.get(name, digest) != digest
    ]
    return [*sorted(changed), *sorted(missing), *sorted(unknown)]


def _file_digest(folder: Path, name: str) -> str | None:
    """sha256 of a file of the folder; of a packed folder's config.json, without the entry that names the format.

    None: it is missing, or outside the folder.
    """
    path = folder / name
    if path.parent not in (folder, folder / CHAT_TEMPLATES) or not path.is_file():
        return None
    if name == CONFIGURATION and (folder / PACKED_INDEX).exists():
        return hashlib.sha256(plain_configuration(path.read_bytes())).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpacked_digest(source: CheckpointSource, name: str, packed: Mapping[str, str]) -> str | None:
    """sha256 of the file that a packed checkpoint unpacks to this name; None: no packed shard does."""
    if name == INDEX_NAME:
        weight_map = {tensor: source.packed[info.file].file for tensor, info in source.tensors.items()}
        return hashlib.sha256(dense_index(weight_map, source.bytes)).hexdigest()
    if name not in packed:
        return None
    file = packed[name]
    tensors = source.read([tensor for tensor, info in source.tensors.items() if info.file == file])
    table = source.packed[file]
    return dense_digest(tensors, table.metadata, table.header)
