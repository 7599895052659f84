"""The output folder: checks before it is written, and its name once it is finished."""

import glob
import logging
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from llm_barber.checkpoint.companions import LOCK_NAME, REPLACED
from llm_barber.checkpoint.durable import is_full, remove, sync_folder
from llm_barber.checkpoint.folder import make_locked
from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.replacing import check_replaceable
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.errors import OutputError
from llm_barber.usage import readable_bytes

PARTIAL = ".partial"  # end of a work folder's name
logger = logging.getLogger(__name__)


class WorkFolder:
    """The work folder of an output, and the lock in it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = work_folder(output)

    def make(self, overwrite: bool) -> None:
        """Make the folder and its parents, and hold its lock.

        Raises:
            OutputError: another run holds the lock, the folder cannot be written, or another run has finished the
                output meanwhile.
        """
        self._made_parents = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.lock = make_locked(self.path, LOCK_NAME, self.output)
        except OutputError:
            self._remove_parents()
            raise
        try:
            check_output(self.output, overwrite)  # before the lock was held, another run may have finished it
        except BaseException:
            if [path.name for path in self.path.iterdir()] == [LOCK_NAME]:
                self.remove()
            self.lock.release()
            raise

    def remove(self) -> None:
        """Remove the folder with its content, and the parents that were made for it; the lock is still held."""
        with suppress(OSError):
            remove_marked(self.path, LOCK_NAME)
        self._remove_parents()

    def _remove_parents(self) -> None:
        with suppress(OSError):  # the first that is not empty ends it
            for folder in self._made_parents:
                folder.rmdir()


def work_folder(output: Path) -> Path:
    """Path of the folder beside an output in which a run writes it."""
    return output.with_name(f"{output.name}{PARTIAL}")


def check_output(output: Path, overwrite: bool, needed: int = 0) -> None:
    """Refuse a folder where the output cannot be written, or where it would harm other files.

    Args:
        output: the folder to write.
        overwrite: replace a model folder of that name.
        needed: bytes that the work folder takes at most. Files that are in it already need no more room: a resumed run
            keeps or replaces them, and any other run deletes them.

    Raises:
        OutputError: the folder is in use, exists and may not be replaced, or is not writable; the disk is too small.
    """
    if use := folder_in_use(output):
        raise OutputError(f"{output} is {use}", "choose another output folder")
    partial = work_folder(output)
    is_work_folder = (partial / LOCK_NAME).is_file() or (partial.is_dir() and not any(partial.iterdir()))
    if partial.is_symlink() or (partial.exists() and not is_work_folder):
        raise OutputError(
            f"{partial} is in the way: the work folder of {output} has that name",
            "rename it, or choose another output",
        )
    parent = next(folder for folder in output.parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write in {parent}", "choose a folder you can write")
    needed -= sum(path.stat().st_size for path in partial.glob("*") if path.is_file())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"the checkpoint takes {readable_bytes(needed)}, the disk of {output} has {readable_bytes(free)}",
            "free some space or choose another disk",
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file", "choose another output folder")
    if os.path.ismount(output):
        raise OutputError(f"{output} is a mount point, which cannot be replaced", "choose a folder inside it")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{output} exists", "choose another output folder, or add --overwrite")
    check_replaceable(output)


def unwritable(output: Path, error: OSError, resumable: bool) -> OutputError:
    """Explain an error of the disk; `resumable`: an unfinished run stays, from which another run can go on."""
    full = is_full(error)
    again = "go on with --resume" if resumable else "start again; nothing half-written was left"
    return OutputError(
        f"the disk of {output} is full" if full else f"cannot write {output}: {error}",
        f"{'free some space' if full else 'check the disk'} and {again}",
    )


def give_name(partial: Path, output: Path) -> None:
    """Rename the finished work folder to the output.

    A folder that has this name is renamed first, and gets its name back if the work folder cannot be renamed.

    Raises:
        OSError: a folder cannot be renamed.
    """
    sync_folder(partial)
    replaced = None
    if output.exists():
        with suppress(OSError):  # without permission to write in it, the replaced folder is kept
            (output / REPLACED).touch()
        replaced = _free_name(output)
        output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        if replaced is not None:
            replaced.rename(output)
            (output / REPLACED).unlink(missing_ok=True)
        raise
    sync_folder(output.parent)
    clear_finished(output)


def _free_name(output: Path) -> Path:
    """A name beside an output that nothing has, for the folder that it replaces."""
    name = f"{output.name}.replaced-{os.getpid()}"
    names = chain((name,), (f"{name}-{number}" for number in count(2)))
    return next(path for path in map(output.with_name, names) if not os.path.lexists(path))


def clear_finished(output: Path) -> None:
    """Remove the run's files from a finished output folder, and the folders that it replaced.

    What cannot be removed stays, with a warning in the log: the output is complete.
    """
    _remove_or_warn(output / LOCK_NAME)
    for replaced in output.parent.glob(f"{glob.escape(output.name)}.replaced-*"):
        if (replaced / REPLACED).is_file():  # marked by this run, or by a run that was killed here
            _remove_or_warn(replaced)
    _remove_or_warn(output / STATE_NAME)  # last: while it exists, `--resume` of a killed run comes here again


def _remove_or_warn(path: Path) -> None:
    """Remove a file, or a folder that a finished output has replaced."""
    try:
        if path.is_dir():
            remove_marked(path, REPLACED)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is not needed any more and cannot be removed: %s", path, error)


def remove_marked(folder: Path, marker: str) -> None:
    """Remove a folder, its marker file last.

    If the removal is killed, the rest of the folder is recognised by the marker.
    """
    clear(folder, {marker})
    shutil.rmtree(folder)


def clear(folder: Path, kept_names: Collection[str]) -> None:
    """Remove everything in a folder except the entries of these names."""
    for path in folder.iterdir():
        if path.name not in kept_names:
            remove(path)
