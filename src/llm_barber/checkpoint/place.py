"""The place of an output: what may be there, what lies beside it meanwhile, and how the finished folder comes to it."""

import glob
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from llm_barber.checkpoint.state import STATE_BEFORE, STATE_NAME, sync_folder
from llm_barber.errors import OutputError

LOCK_NAME = "llm-barber.lock"  # also what tells our work folder from any other
REPLACED = "llm-barber.replaced"  # what tells a folder that was replaced from any other


def work_folder(output: Path) -> Path:
    """Where an output is made, beside it."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path, overwrite: bool, needed: int = 0) -> None:
    """Refuse a place where the output cannot be written, or where it would harm what is there.

    Args:
        output: the folder to write.
        overwrite: replace a model folder that is there.
        needed: bytes that it will take; finished shards of its work folder count as there.

    Raises:
        OutputError: it exists and is not to be, or must not be, replaced; the disk is too small or not writable.
    """
    work = work_folder(output)
    ours = (work / LOCK_NAME).is_file() or (work.is_dir() and not any(work.iterdir()))
    if work.is_symlink() or (work.exists() and not ours):
        raise OutputError(
            f"{work} is in the way: the work folder of {output} has that name", "rename it, or choose another output"
        )
    place = next(folder for folder in output.parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise OutputError(f"cannot write in {place}", "choose a folder you can write")
    needed -= sum(path.stat().st_size for path in work.glob("model*.safetensors"))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the checkpoint takes {needed / 1e9:.2f} GB, the disk of {output} has {free / 1e9:.2f} GB",
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
    if not (output / "config.json").exists():
        raise OutputError(
            f"{output} holds something other than a model", "--overwrite replaces model folders only; choose another"
        )


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
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
