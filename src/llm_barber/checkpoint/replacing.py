"""Folders that `--overwrite` may replace: they hold a model and nothing else."""

import re
from pathlib import Path

from llm_barber.checkpoint.companions import CARD_NAME, LOCK_NAME, OWN_JSON, PAGE_NAME, RECORD_NAME, REPLACED
from llm_barber.checkpoint.hub import CHAT_TEMPLATES, INDEX_NAME
from llm_barber.checkpoint.packed_format import PACKED_INDEX, packed_name
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.checkpoint.untrusted import read_json
from llm_barber.errors import ModelError, OutputError
from llm_barber.messages import first_names

PROGRAM_FILES = {*OWN_JSON, CARD_NAME, PAGE_NAME, STATE_NAME, LOCK_NAME, REPLACED}
INDEX_FILES = {INDEX_NAME, PACKED_INDEX}
# Names of the files that Hugging Face tools and this program write for a checkpoint.
CHECKPOINT_FILE = re.compile(
    r"(model|packed-model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|packed\.index\.json"
    r"|pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"
    r"|(config|channel-order|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template"
    r"|processor_config|preprocessor_config|image_processor_config|video_preprocessor_config|params|tekken)\.json"
    r"|(vocab|merges)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model(\.v\d+)?|[\w.-]+\.tiktoken|chat_template\.jinja"
    r"|(licen[cs]e|notice|use_policy)([.-][\w.-]+)?|\.gitattributes",
    re.IGNORECASE,
)


def check_replaceable(output: Path) -> None:
    """Refuse to replace a folder that is no model, or that holds other files.

    With a record (`barber.json`), the folder may hold the files that the record names or that this program writes;
    without a record, files whose names are those of a checkpoint's files.

    Raises:
        OutputError: the folder is no model, or holds other files, which are named.
    """
    if not (output / "config.json").exists():
        raise OutputError(
            f"{output} holds something other than a model", "--overwrite replaces model folders only; choose another"
        )
    recorded = _recorded_files(output)
    foreign = sorted(
        f"{path.relative_to(output)}{'/' if path.is_dir() and not path.is_symlink() else ''}"
        for path in folder_entries(output)
        if not _belongs(path, output, recorded)
    )
    if foreign:
        unknown_to = "neither its record nor this program names" if recorded else "no checkpoint has"
        raise OutputError(
            f"{output} holds files that {unknown_to}: {first_names(foreign)}",
            "--overwrite would delete them: move them elsewhere, or choose another output folder",
        )


def folder_entries(output: Path) -> list[Path]:
    """All entries of a folder; a folder in it is one entry, except the chat templates, file by file."""
    entries = list(output.iterdir())
    templates = output / CHAT_TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        entries = [path for path in entries if path != templates] + list(templates.iterdir())
    return entries


def _recorded_files(output: Path) -> set[str] | None:
    """The files that a folder's record names, dense and packed; None: it has no readable record."""
    try:
        files = read_json(output / RECORD_NAME).get("files")
    except ModelError:
        return None
    return {*files, *map(packed_name, files)} if isinstance(files, dict) else None


def _belongs(path: Path, output: Path, recorded: set[str] | None) -> bool:
    if path.is_dir() and not path.is_symlink():
        return False
    if path.parent != output:
        return path.suffix == ".jinja"
    if is_program_file(path.name) or path.name in INDEX_FILES:
        return True
    return path.name in recorded if recorded is not None else CHECKPOINT_FILE.fullmatch(path.name) is not None


def is_program_file(name: str) -> bool:
    """True for a file that this program writes beside a model and on which no loaded model depends."""
    return name.removesuffix(".tmp") in PROGRAM_FILES
