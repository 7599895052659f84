"""Windows of calibration tokens, chosen by a seed.

A text is tokenised as one stream and cut into windows of `seqlen` without overlap (`windows.py`). The seed chooses
windows and their order. Documents (of jsonl, parquet, and the hub's sets) are joined by blank lines first.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_barber.checkpoint.untrusted import check_regular, parse_json
from llm_barber.errors import CalibrationError, HubError, SettingsError
from llm_barber.text.suffixes import SUFFIXES, TOKEN_FILE_SUFFIX
from llm_barber.text.windows import TextTokenizer, windows_of
from llm_barber.usage import current_memory, readable_bytes

BUILTIN = {
    "builtin": "wikipedia-leads.txt",
    "builtin-test": "wikitext2-raw-test.txt",
}
HUB_SETS: dict[str, dict[str, Any]] = {
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
        "streaming": True,
    },
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
}
WHOLE_SETS = {"wikitext2": 11 * 10**6}  # characters of the sets that are read whole
OWN_TOKENS = "give --calibration a safetensors file with input_ids"
JSON_LINE = 'each line: {"text": "…"}'
# Characters of a streamed set to read per token. English has about 4.5; more, so that windows are not adjacent.
CHARACTERS_PER_TOKEN = 12
# Bytes of memory per character while a text is tokenised, and from then until the process ends: tokenizers keep data of
# each token (measured with vocabularies of 49,152 and 262,144).
READING_BYTES, READ_BYTES = 150, 70


@dataclass(frozen=True)
class CalibrationTokens:
    """Calibration tokens `input_ids`, int64 (sequences, tokens), and `source`, the name of their text."""

    input_ids: Tensor
    source: str

    @property
    def digest(self) -> str:
        """sha256 of the token ids (little-endian int64, row by row)."""
        return hashlib.sha256(self.input_ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def first_token(self) -> int | None:
        """First token of all windows, usually BOS; None: windows begin with different tokens."""
        first = self.input_ids[:, 0]
        return int(first[0]) if (first == first[0]).all() else None


def known_calibrations() -> str:
    """Known names and kinds of files, for messages."""
    return f"{', '.join(['builtin', *HUB_SETS])}, or a file ending in {', '.join(SUFFIXES)}"


def load_calibration(
    name: str,
    find_tokenizer: Callable[[], TextTokenizer | None],
    samples: int,
    seqlen: int,
    seed: int,
    bos: bool = True,
) -> CalibrationTokens:
    """Load calibration windows.

    Args:
        name: `builtin`, `c4`, `wikitext2`, or a file: text, jsonl (field `text`), parquet (column `text`), or
            safetensors with int64 `input_ids` of shape (sequences, tokens), which are taken as they are.
        find_tokenizer: returns the model's tokenizer, or None; not called for safetensors.
        samples: number of windows.
        seqlen: tokens per window.
        seed: seed of the choice of windows.
        bos: let each window begin as the tokenizer lets texts begin, usually with BOS.

    Raises:
        CalibrationError: the text is unknown, unreadable or too short.
        HubError: the hub is needed and cannot be reached.
    """
    if name.endswith(TOKEN_FILE_SUFFIX):
        return CalibrationTokens(_read_tokens(Path(expanduser(name))), name)
    text = read_text(name, samples * seqlen)
    try:
        tokenizer = find_tokenizer()
    except CalibrationError as error:
        raise CalibrationError(error.message, f"{error.hint}, or {OWN_TOKENS}") from error
    if tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, which calibration text needs",
            f"add its tokenizer files, or {OWN_TOKENS}",
        )
    windows, tokens = windows_of(text, tokenizer, seqlen, bos)
    count = len(windows)
    if count < samples:
        raise CalibrationError(
            f"calibration text {name!r} has {tokens} tokens, {count} windows of {seqlen}; {samples} are needed",
            f"use --samples {count} or fewer, a shorter --seqlen, or a longer text"
            if count
            else f"use a {f'--seqlen of {tokens} or less, or a ' if tokens > 1 else ''}longer text",
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return CalibrationTokens(windows[chosen], name)


def text_size(name: str, tokens_wanted: int) -> int:
    """Estimate the characters of a text without reading it; 0 for a file of tokens, or a missing file."""
    if name in BUILTIN:
        return len((files("llm_barber") / "data" / BUILTIN[name]).read_bytes())
    if name in HUB_SETS:
        return tokens_wanted * CHARACTERS_PER_TOKEN if HUB_SETS[name].get("streaming") else WHOLE_SETS[name]
    path = Path(expanduser(name))
    if name.endswith(TOKEN_FILE_SUFFIX) or not path.is_file():
        return 0
    return (_parquet_size(path) if path.suffix == ".parquet" else 0) or path.stat().st_size


def _parquet_size(path: Path) -> int:
    """Bytes of a parquet file's texts by its footer, without compression; texts in a dictionary count once; 0: none."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    except (OSError, ValueError):  # reading it will say what is wrong
        return 0
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")


def check_text_fits(name: str, samples: int, seqlen: int, memory: int) -> None:
    """Refuse a text if reading it takes more than `memory` bytes.

    Raises:
        SettingsError: it does.
    """
    size, enough = text_size(name, samples * seqlen), samples * seqlen * CHARACTERS_PER_TOKEN
    needed = current_memory() + READING_BYTES * size
    if size and needed > memory:
        raise SettingsError(
            f"--memory: {readable_bytes(memory, 1024)} are not enough to read the {readable_bytes(size)} of "
            f"calibration text {name}, which takes {readable_bytes(needed, 1024)}",
            f"give a shorter text ({readable_bytes(enough)} are plenty for {samples} windows of {seqlen} tokens), "
            "a file of tokens, or more memory",
        )


def token_shape(name: str) -> tuple[int, int]:
    """Shape (sequences, tokens) of a file of tokens.

    Raises:
        CalibrationError: as `load_calibration`.
    """
    sequences, tokens = _read_tokens(Path(expanduser(name))).shape
    return sequences, tokens


def check_calibration(name: str) -> None:
    """Refuse a name that is neither a known text nor a file; nothing is read.

    Raises:
        CalibrationError: it is neither.
    """
    if name in BUILTIN or name in HUB_SETS:
        return
    path = Path(expanduser(name))
    check_regular(path, CalibrationError)
    if not path.is_file():
        is_file_name = path.suffix or len(path.parts) > 1
        hint = "check the path: there is no such file" if is_file_name else f"known are {known_calibrations()}"
        raise CalibrationError(f"no such calibration text: {name}", hint)


def read_text(name: str, tokens_wanted: int | None = None) -> str:
    """Read the text of a name or file; of a streamed set, ample characters for `tokens_wanted` tokens.

    Raises:
        CalibrationError: the text is unknown or unreadable.
        HubError: the hub cannot be reached.
    """
    check_calibration(name)
    if name in BUILTIN:
        return (files("llm_barber") / "data" / BUILTIN[name]).read_text(encoding="utf-8")
    if name in HUB_SETS:
        return _read_hub(name, tokens_wanted)
    path = Path(expanduser(name))
    try:
        match path.suffix:
            case ".jsonl":
                return "\n\n".join(_jsonl_documents(path))
            case ".parquet":
                return "\n\n".join(_parquet_documents(path))
            case _:
                return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text", "save it as UTF-8, for example with iconv") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = parse_json(line)
            except ValueError as error:
                raise CalibrationError(f"{path} line {number} is not JSON: {error}", JSON_LINE) from error
            document = content.get("text") if isinstance(content, dict) else None
            if not isinstance(document, str):
                raise CalibrationError(f"{path} line {number} is not an object with a string `text`", JSON_LINE)
            yield document


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if names.count("text") != 1:
                problem = f"no column `text` but {', '.join(names)}" if "text" not in names else "two columns `text`"
                raise CalibrationError(f"{path} has {problem}", "rename the column")
            for batch in file.iter_batches(columns=["text"]):
                documents = batch["text"].to_pylist()
                if not all(isinstance(document, str | None) for document in documents):
                    raise CalibrationError(f"column `text` of {path} is not of strings", "check the file")
                yield from filter(None, documents)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} is not a parquet file: {error}", "check the file") from error


def _read_hub(name: str, tokens_wanted: int | None) -> str:
    from datasets import load_dataset

    settings = HUB_SETS[name]
    limit = None if tokens_wanted is None or "streaming" not in settings else tokens_wanted * CHARACTERS_PER_TOKEN
    documents: list[str] = []
    characters = 0
    try:
        for row in load_dataset(**settings):
            documents.append(row["text"])
            characters += len(row["text"])
            if limit is not None and characters >= limit:
                break
    except Exception as error:  # the library raises any error of its parts
        raise HubError(
            f"calibration set {name} could not be loaded from the hub ({type(error).__name__})",
            "check the connection, or use --calibration builtin or a file of your own",
        ) from error
    return "\n\n".join(documents)


def _read_tokens(path: Path) -> Tensor:
    hint = "it must hold int64 `input_ids` of shape (sequences, tokens), two tokens or more"
    check_regular(path, CalibrationError)
    if not path.is_file():
        raise CalibrationError(f"no such calibration file: {path}", "check the path")
    try:
        with safe_open(path, framework="pt") as file:
            if "input_ids" not in file.keys():  # noqa: SIM118 - a handle, not a dict
                raise CalibrationError(f"{path} has no input_ids", hint)
            tokens: Tensor = file.get_tensor("input_ids").clone()
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is not a safetensors file ({error})", hint) from error
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(f"input_ids in {path} is {tokens.dtype} of shape {tuple(tokens.shape)}", hint)
    return tokens
