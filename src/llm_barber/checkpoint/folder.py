"""A folder that one command owns: it is made or recognised by a marker file, and one run at a time writes in it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_barber.errors import OutputError


def own_folder(folder: Path, marker: str, explanation: str) -> None:
    """Make the folder, or recognise it by its marker; other people's folders are left alone.

    Args:
        folder: the folder.
        marker: name of the marker file.
        explanation: what the marker file says.

    Raises:
        OutputError: it is there and not ours, or cannot be written.
    """
    path = folder / marker
    if path.is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and has no {marker}", "choose another output folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(explanation + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "choose another output folder") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the operating system lets go of it when the process ends, however it ends.

    Raises:
        OutputError: another run holds it, or it cannot be written.
    """
    try:
        file = path.open("r+" if path.exists() else "w")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "choose a folder you can write") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another run is writing {path.parent}", "wait for it, or choose another output folder"
            ) from error
        yield
