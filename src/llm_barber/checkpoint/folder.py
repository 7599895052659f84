"""A folder that belongs to one command: marked by a file, and locked for one run at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llm_barber.errors import OutputError

ATTEMPTS = 100  # to make a folder that another run may remove meanwhile
# Errors of a file system that has no locks.
WITHOUT_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_claimable(folder: Path, marker: str) -> None:
    """Refuse a file, and a folder of other files without the marker.

    Raises:
        OutputError: it is one.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", "choose another output folder")
    if folder.is_dir() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise OutputError(
            f"{folder} was not made by this command: it has no {marker}", "give a new folder, or an empty one"
        )


def claim_folder(folder: Path, marker: str, explanation: str) -> None:
    """Make the folder and its marker file, or recognise the marker.

    Args:
        folder: the folder.
        marker: name of the marker file.
        explanation: content of the marker file.

    Raises:
        OutputError: as `check_claimable`, or the folder cannot be written.
    """
    check_claimable(folder, marker)
    if (folder / marker).is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker).write_text(explanation + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "choose another output folder") from error


def take_lock(path: Path, output: Path) -> FileLock:
    """Hold a lock file until the lock is released, by any thread.

    The operating system releases the lock when the process ends, however it ends. The file keeps its content: it may be
    the marker of a folder.

    Args:
        path: the lock file; made if its folder exists.
        output: the folder that the holder writes, for messages.

    Raises:
        OutputError: another run holds the lock, or the file system has no locks.
        FileNotFoundError: the folder does not exist, or another run has removed it meanwhile.
        OSError: the file cannot be written.
    """

    def check_path(locked_file: int) -> None:
        if not os.path.samestat(os.fstat(locked_file), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    path.parent.stat()  # `FileLock` would make the folder
    lock = FileLock(path, blocking=False, thread_local=False, preserve_lock_file=True, on_acquired=check_path)
    try:
        lock.acquire()
    except Timeout as error:
        path.stat()  # FileNotFoundError: the file was removed before it was locked
        raise OutputError(f"another run is writing {output}", "wait for it, or choose another output folder") from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        raise OutputError(
            f"{path} cannot be locked: {error.strerror}",
            "some shared file systems have no locks unless mounted with them (flock); choose a folder on another",
        ) from error
    return lock


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file in a folder that stays.

    Raises:
        OutputError: another run holds the lock, or the file cannot be written.
    """
    try:
        lock = take_lock(path, path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def make_locked(folder: Path, name: str, output: Path) -> FileLock:
    """Make a folder that its run removes in the end, and hold the lock file `name` in it.

    Raises:
        OutputError: another run holds the lock, or the folder cannot be made.
    """
    attempts_left = ATTEMPTS
    while True:
        attempts_left -= 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return take_lock(folder / name, output)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or not attempts_left:
                raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror}", "choose a folder you can write")
