"""Only regular files are opened: to open a named pipe waits for a writer, and some devices never end."""

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
    """Refuse what is there and is no regular file, links followed; whoever opens a missing file says that it is.

    Args:
        path: is going to be opened.
        kind: of the error.

    Raises:
        BarberError: of that kind.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        name = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
        raise kind(f"{path} is {name}, not a regular file", "put a regular file there, or give the path of one")


def check_all_regular(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a folder with named pipes, sockets or devices under such names; folders in it are left to their readers.

    Raises:
        ModelError: there is one.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes and not path.is_dir())
    except OSError:
        return
    for path in paths:
        check_regular(path)
