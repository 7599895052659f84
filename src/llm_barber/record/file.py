"""Read the record of a run, `barber.json`, and refuse one that was changed."""

import json
from pathlib import Path

from pydantic import ValidationError

from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.digests import has_its_digest
from llm_barber.checkpoint.untrusted import read_json, read_result
from llm_barber.errors import ModelError
from llm_barber.masking.pattern import parse_pattern
from llm_barber.model.architecture import Block, StructureOptions
from llm_barber.record.report import RECORD_VERSION, RunReport

AGAIN = "get the folder again, or prune again; without barber.json nothing in the folder can be verified"


def read_record(folder: Path) -> RunReport | None:
    """Read the record of a checkpoint folder; None: it has none.

    Only a record that this program wrote is accepted: its digest fits, and writing it again gives the same content, so
    that no field is unknown and no sum disagrees with its parts.

    Raises:
        ModelError: the record is damaged, was changed, or is of another version.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    content = read_json(path)
    if (version := content.get("record_version")) != RECORD_VERSION:
        raise ModelError(
            f"{path} has version {version!r}, this program reads {RECORD_VERSION}",
            "use the version of llm-barber that wrote it, or prune again",
        )
    if not has_its_digest(content):
        raise ModelError(f"{path} was changed since it was written (its digest does not fit)", AGAIN)
    try:
        record = read_result(path, RunReport)
        _check_readable(record)
    except ValueError as error:
        reason = f"{error.error_count()} wrong fields" if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{path} is not a record of this program ({reason})", AGAIN) from error
    if json.loads(record.to_json()) != content:
        raise ModelError(f"{path} is not a record of this program (fields that are unknown or disagree)", AGAIN)
    return record


def _check_readable(record: RunReport) -> None:
    """Raise `ValueError` for a record without linears, or with an unreadable pattern or structure."""
    if not record.weights:
        raise ValueError("no linears")
    if not isinstance(record.settings.get("layers"), str | None):
        raise ValueError("settings: layers is not text")
    for layer in record.layers:
        for linear in layer.linears:
            if linear.pattern is not None:
                parse_pattern(linear.pattern)
    try:
        recorded_structure(record)
    except (KeyError, TypeError) as error:
        raise ValueError("settings: blocks lack a part") from error


def recorded_structure(record: RunReport | None) -> StructureOptions:
    """The structure that the user gave for the model of a record; empty: the program found it itself."""
    if record is None:
        return StructureOptions()
    blocks = [
        Block(block["name"], block["output"], tuple(block["linears"])) for block in record.settings.get("blocks", ())
    ]
    return StructureOptions(record.settings.get("layers"), tuple(blocks))
