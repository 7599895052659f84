"""The output folder: what may be there, what lies beside it meanwhile, and how the finished folder gets its name."""

import glob
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from llm_barber.checkpoint.companions import LOCK_NAME, REPLACED
from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.replacing import check_replaceable
from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME, read_state, remove, sync_folder
from llm_barber.errors import OutputError
from llm_barber.usage import readable_bytes


def work_folder(output: Path) -> Path:
    """Where an output is made, beside it."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, overwrite: bool, needed: int = 0, resume: bool = False) -> None:
    """Refuse a folder where the output cannot be written, or where it would harm other files.

    Args:
        output: the folder to write.
        overwrite: replace a model folder of that name.
        needed: bytes of the whole checkpoint, unpacked.
        resume: an unfinished run is continued, so that its finished shards need no room again.

    Raises:
        OutputError: the folder is in use, exists and may not be replaced, or is not writable; the disk is too small.
    """
    if use := folder_in_use(output):
        raise OutputError(f"{output} is {use}", "choose another output folder")
    work = work_folder(output)
    ours = (work / LOCK_NAME).is_file() or (work.is_dir() and not any(work.iterdir()))
    if work.is_symlink() or (work.exists() and not ours):
        raise OutputError(
            f"{work} is in the way: the work folder of {output} has that name", "rename it, or choose another output"
        )
    parent = next(folder for folder in output.parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write in {parent}", "choose a folder you can write")
    _check_room(output, parent, needed - _bytes_not_needed(work, resume))
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


def _check_room(output: Path, parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"the checkpoint takes {readable_bytes(needed)}, the disk of {output} has {readable_bytes(free)}",
            "free some space or choose another disk",
        )


def _bytes_not_needed(work: Path, resume: bool) -> int:
    """Bytes of the checkpoint for which a work folder has the room already.

    A resumed run keeps the finished shards: each stands for its unpacked bytes. Any other run deletes all files first.
    """
    try:
        state = read_state(work) if resume else None
    except OutputError:  # damaged; the writer says so
        state = None
    if state is None:
        return sum(path.stat().st_size for path in work.glob("*") if path.is_file())
    paths = {work / name: shard.bytes for name, shard in state.shards.items()}
    return sum(max(size, path.stat().st_size) for path, size in paths.items() if path.is_file())


def put_in_place(work: Path, output: Path) -> None:
    """Give the finished work folder its name; what has it goes first, and comes back if that fails.

    Raises:
        OSError: it cannot be renamed.
    """
    sync_folder(work)
    replaced = None
    if output.exists():
        with suppress(OSError):  # it may not be ours to write in: then it stays
            (output / REPLACED).touch()
        replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
        output.rename(replaced)
    try:
        work.rename(output)
    except OSError:
        if replaced is not None:
            replaced.rename(output)
            (output / REPLACED).unlink(missing_ok=True)
        raise
    sync_folder(output.parent)
    clear_finished(output)


def clear_finished(output: Path) -> None:
    """Remove what a run still has in its output folder, and what was replaced, when that is whole and has its name."""
    (output / LOCK_NAME).unlink(missing_ok=True)
    (output / STATE_BEFORE).unlink(missing_ok=True)
    for left in output.parent.glob(f"{glob.escape(output.name)}.replaced-*"):
        if (left / REPLACED).is_file():
            _remove(left, REPLACED)  # ours, or of a run that was killed here
    (output / STATE_NAME).unlink(missing_ok=True)  # last: while it is there, a killed run can be told to do this


def remove_work_folder(work: Path) -> None:
    """With all that is in it."""
    _remove(work, LOCK_NAME)


def _remove(folder: Path, marker: str) -> None:
    """Its marker goes last, so that what a killed run leaves is known."""
    clear(folder, {marker})
    shutil.rmtree(folder)


def clear(folder: Path, kept: Collection[str]) -> None:
    """Remove all that is in a folder but what has these names."""
    for path in folder.iterdir():
        if path.name not in kept:
            remove(path)
