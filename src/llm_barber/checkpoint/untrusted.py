"""Check files from elsewhere before use: that they are regular files, their JSON, the names of files in them.

To open a named pipe waits for a writer, and some devices never end.
"""

import json
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from llm_barber.errors import BarberError, ModelError

LONGEST_NAME = 255  # bytes of a file's name
DAMAGED = "the file is damaged; get it again"
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair, perhaps without the other half
Result = TypeVar("Result", bound=BaseModel)


def check_regular(path: Path, kind: type[BarberError] = ModelError) -> None:
    """Refuse a path that exists and is no regular file, links followed.

    A missing file is not refused: whoever opens it reports that.

    Args:
        path: the path to open.
        kind: class of the error.

    Raises:
        BarberError: of the class `kind`.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        name = KINDS.get(stat.S_IFMT(mode), "something else")
        raise kind(f"{path} is {name}, not a regular file", "put a regular file there, or give the path of one")


def check_all_regular(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a folder in which a path with one of the suffixes is a named pipe, a socket or a device.

    Folders in it are not looked at: their readers check them.

    Raises:
        ModelError: a path is a named pipe, a socket or a device.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes and not path.is_dir())
    except OSError:
        return
    for path in paths:
        check_regular(path)


def is_utf8(text: str | Path) -> bool:
    """Test whether a text can be written as UTF-8.

    A path with other bytes cannot, and files that a run writes contain paths.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(content: str | bytes) -> Any:
    """Parse a JSON document; bytes are UTF-8.

    Raises:
        ValueError: the content is not JSON, is nested too deeply, or has text that is no Unicode (a lone surrogate).
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        parsed = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
        return parsed
    except UnicodeEncodeError as error:
        raise ValueError("it holds a lone surrogate (\\ud800 to \\udfff), which is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, hint: str = DAMAGED) -> dict[str, Any]:
    """Read a checkpoint's JSON file that holds an object.

    Raises:
        ModelError: the file holds something else, or cannot be read.
    """
    check_regular(path)
    try:
        content = parse_json(path.read_bytes())
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
