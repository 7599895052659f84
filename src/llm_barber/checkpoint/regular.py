"""Open regular files only: to open a named pipe waits for a writer, and some devices never end."""

import stat
from collections.abc import Callable
from pathlib import Path

from llm_barber.errors import BarberError, ModelError

KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


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
        name = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
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
