"""Check the content of files from elsewhere before use: JSON, safetensors headers, names of files."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from llm_barber.checkpoint.regular import check_regular
from llm_barber.errors import ModelError

LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
LONGEST_NAME = 255  # bytes of a file's name
DAMAGED = "the file is damaged; get it again"
Result = TypeVar("Result", bound=BaseModel)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair, perhaps without the other half


def is_utf8(text: str | Path) -> bool:
    """Test whether a text can be written as UTF-8.

    A path with other bytes cannot, and files that a run writes contain paths.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(content: str | bytes, distinct_keys: bool = False) -> Any:
    """Parse a JSON document.

    Args:
        content: text; bytes are UTF-8.
        distinct_keys: refuse objects that have a key twice: a reader would see the last value only.

    Raises:
        ValueError: the content is not JSON, is nested too deeply, or has text that is no Unicode (a lone surrogate).
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_distinct if distinct_keys else None)
        if SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
        return parsed
    except UnicodeEncodeError as error:
        raise ValueError("it holds a lone surrogate (\\ud800 to \\udfff), which is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, distinct_keys: bool = False, hint: str = DAMAGED) -> dict[str, Any]:
    """Read a checkpoint's JSON file that holds an object; `distinct_keys` as in `parse_json`.

    Raises:
        ModelError: the file holds something else, or cannot be read.
    """
    check_regular(path)
    try:
        content = parse_json(path.read_bytes(), distinct_keys)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", hint)
    return content


def read_result(path: Path, kind: type[Result]) -> Result:
    """Read a file that this program wrote of a run, a cell or an evaluation.

    Raises:
        ModelError: it is no regular file.
        ValueError: it is damaged, or has whole numbers beyond 64 bits, which later computations could not hold.
        OSError: it cannot be read.
    """
    check_regular(path)
    content = path.read_bytes()
    try:
        json.loads(content.decode("utf-8"), parse_int=_of_64_bits)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return kind.model_validate_json(content)


def _of_64_bits(digits: str) -> int:
    if len(digits) > len(str(-(2**63))) or abs(int(digits)) >= 2**63:
        raise ValueError(f"it has the number {digits[:30]}, beyond 64 bits")
    return int(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} is there twice")
    return content


def check_header(path: Path) -> None:
    """Refuse a safetensors file that names a tensor twice: its readers take the last in silence.

    safetensors has opened the file before, and so checked the rest of its header.

    Raises:
        ModelError: a tensor is named twice, or the header is damaged.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("its header is longer than the file")
            parse_json(file.read(size), distinct_keys=True)
    except ValueError as error:
        raise ModelError(
            f"the header of {path.name} is damaged: {error}", "get the file again, or write it again with safetensors"
        ) from error


def check_file_name(name: Any, source: str) -> None:
    """Refuse a name that is not the plain name of a file.

    `source` is the file that has the name in it.

    Raises:
        ModelError: the name is a path, is empty or is too long.
    """
    plain = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
    if not plain or len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        raise ModelError(
            f"{source} names {name!r}, which is not a file of its folder",
            "do not trust this checkpoint; get it again from where it was published",
        )
