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
from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.replacing import check_replaceable
from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME, read_state
from llm_barber.errors import OutputError
from llm_barber.usage import readable_bytes

PARTIAL = ".partial"  # end of a work folder's name
logger = logging.getLogger(__name__)


def work_folder(output: Path) -> Path:
    """Path of the folder beside an output in which a run writes it."""
    return output.with_name(f"{output.name}{PARTIAL}")


def check_output(output: Path, overwrite: bool, needed: int = 0, resume: bool = False, activations: int = 0) -> None:
    """Refuse a folder where the output cannot be written, or where it would harm other files.

    Args:
        output: the folder to write.
        overwrite: replace a model folder of that name.
        needed: bytes of the whole checkpoint, unpacked.
        resume: an unfinished run is continued, so that its finished shards need no room again.
        activations: bytes of all files of activations that the work folder holds at once.

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
    shards, kept_activations = _present_bytes(partial, resume)
    _check_room(output, parent, needed - shards, max(0, activations - kept_activations))
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


def _check_room(output: Path, parent: Path, needed: int, activations: int) -> None:
    free = shutil.disk_usage(parent).free
    if free >= needed + activations:
        return
    takes = f"the checkpoint takes {readable_bytes(max(0, needed))}"
    hint = "free some space or choose another disk"
    if activations:
        takes += f", files of activations meanwhile {readable_bytes(activations)}"
        hint += "; fewer calibration tokens make smaller files"
    raise OutputError(f"{takes}, the disk of {output} has {readable_bytes(free)}", hint)


def _present_bytes(partial: Path, resume: bool) -> tuple[int, int]:
    """Bytes of a work folder's files, for which the run needs no more room.

    A resumed run keeps the finished shards, each of which stands for its unpacked bytes, and the files of activations
    that its state names. It deletes all other files, and any other run deletes all.

    Returns:
        Bytes of finished shards and of files to delete; bytes of activations that are kept.
    """
    try:
        state = read_state(partial) if resume else None
    except OutputError:  # the state is damaged; the writer says so
        state = None
    sizes = {path.name: path.stat().st_size for path in partial.glob("*") if path.is_file()}
    if state is None:
        return sum(sizes.values()), 0
    activations = {saved.file for saved in state.activations}
    unpacked = {name: shard.bytes for name, shard in state.shards.items()}
    others = sum(max(size, unpacked.get(name, 0)) for name, size in sizes.items() if name not in activations)
    return others, sum(size for name, size in sizes.items() if name in activations)


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
    for name in (LOCK_NAME, STATE_BEFORE):
        _remove_or_warn(output / name)
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
