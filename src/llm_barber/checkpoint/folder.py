"""A folder that belongs to one command: marked by a file, and locked for one run at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llm_barber.errors import OutputError

ATTEMPTS = 100  # to make a folder that another run may remove meanwhile


def claim_folder(folder: Path, marker: str, explanation: str) -> None:
    """Make the folder and its marker file, or recognise the marker; a folder of other files is refused.

    Args:
        folder: the folder.
        marker: name of the marker file.
        explanation: content of the marker file.

    Raises:
        OutputError: the folder exists without the marker, or cannot be written.
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


def take_lock(path: Path, output: Path) -> IO[str]:
    """Hold a lock file until it is closed.

    The operating system releases the lock when the process ends, however it ends. The file keeps its content: it may be
    the marker of a folder.

    Args:
        path: the lock file.
        output: the folder that the holder writes, for messages.

    Raises:
        OutputError: another run holds the lock, or the file system has no locks.
        OSError: the file cannot be written.
    """
    file = path.open("r+" if path.exists() else "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise OutputError(
                f"{path} cannot be locked: {error.strerror}",
                "some shared file systems have no locks unless mounted with them (flock); choose a folder on another",
            ) from error
        raise OutputError(f"another run is writing {output}", "wait for it, or choose another output folder") from error
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file in a folder that stays.

    Raises:
        OutputError: another run holds the lock, or the file cannot be written.
    """
    try:
        file = take_lock(path, path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    with file:
        yield


def make_locked(folder: Path, name: str, output: Path) -> IO[str]:
    """Make a folder that its run removes in the end, and hold the lock file `name` in it.

    Raises:
        OutputError: another run holds the lock, or the folder cannot be made.
    """
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder / name, output)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts_left:
                continue
            raise _cannot_write(folder, error) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (folder / name).stat()):
                return lock
        lock.close()  # the locked file is of a folder that another run has removed meanwhile
    raise OutputError(f"cannot write {folder}: it is removed again and again", "choose another output folder")


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror}", "choose a folder you can write")
