"""Write a checkpoint shard by shard into a work folder beside the output, which appears under its name only when whole.

Each shard: temporary file → fsync → rename. The index is written last, then the folder is renamed. A run that ends
early leaves at most `NAME.partial`, without an index, which no program takes for a model.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save_file
from torch import Tensor

from llm_barber.checkpoint.hub import INDEX_NAME
from llm_barber.errors import OutputError

LOCK_NAME = "llm-barber.lock"  # also what tells our work folder from any other


class CheckpointWriter:
    """An output folder in the making; a context manager that cleans up when an error leaves it.

    Args:
        output: the folder to make.
        shards: how many there will be.
        overwrite: replace a folder that is there, at the very end.
        needed: bytes that the checkpoint will take, checked against the free disk space.

    Raises:
        OutputError: the folder exists, another run is writing it, the disk is too small or cannot be written.
    """

    def __init__(self, output: Path, shards: int, overwrite: bool, needed: int) -> None:
        self.output = output
        self.work = output.with_name(f"{output.name}.partial")
        self.shards = shards
        self.overwrite = overwrite
        self.needed = needed
        self.weight_map: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.total_size = 0
        self._written = 0

    def __enter__(self) -> Self:
        check_output(self.output, self.overwrite, self.needed)
        self._made_parents = [folder for folder in self.work.parents if not folder.exists()]
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = (self.work / LOCK_NAME).open("w")
        except OSError as error:
            self._remove_parents()
            raise OutputError(f"cannot write {self.work}: {error.strerror}", "choose a folder you can write") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OutputError(
                f"another run is writing {self.output}", "wait for it, or choose another output folder"
            ) from error
        for left in self.work.iterdir():  # of a run that was killed
            if left.name != LOCK_NAME:
                left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if self.work.exists():
            with suppress(OSError):
                shutil.rmtree(self.work)
            self._remove_parents()
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OutputError(
                f"the disk of {self.output} is full" if full else f"cannot write {self.output}: {error}",
                "free some space and start again; nothing half-written was left" if full else "check the disk",
            ) from error

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard; tensors go by their names in the checkpoint.

        Raises:
            OSError: the disk is full.
        """
        self._written += 1
        number = self._written
        name = f"model-{number:05d}-of-{self.shards:05d}.safetensors"
        temporary = self.work / f"{name}.tmp"
        try:
            save_file(
                {key: tensor.cpu().contiguous() for key, tensor in tensors.items()},
                temporary,
                metadata={"format": "pt"},
            )
        except Exception as error:
            # safetensors wraps the operating system's error in its own.
            if "No space left" in str(error) or "os error 28" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
            self.digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        temporary.rename(self.work / name)
        for key, tensor in tensors.items():
            self.weight_map[key] = name
            self.total_size += tensor.numel() * tensor.element_size()

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably."""
        with (self.work / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, path: Path) -> None:
        """Copy a companion file under its own name."""
        content = path.read_bytes()
        self.write_file(path.name, content)
        self.digests[path.name] = hashlib.sha256(content).hexdigest()

    def finish(self) -> None:
        """Write the index and give the folder its name."""
        index = {
            "metadata": {"total_size": self.total_size},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        self.write_file(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
        (self.work / LOCK_NAME).unlink()
        _sync_folder(self.work)
        replaced = None
        if self.output.exists():
            replaced = self.output.with_name(f"{self.output.name}.replaced-{os.getpid()}")
            self.output.rename(replaced)
        try:
            self.work.rename(self.output)
        except OSError:
            if replaced is not None:
                replaced.rename(self.output)
            raise
        _sync_folder(self.output.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _remove_parents(self) -> None:
        """Remove the folders that were made for the work folder, as far as they are empty."""
        with suppress(OSError):
            for folder in self._made_parents:
                folder.rmdir()


def check_output(output: Path, overwrite: bool, needed: int = 0) -> None:
    """Refuse a place where the output cannot be written, or where it would harm what is there.

    Args:
        output: the folder to write.
        overwrite: replace a model folder that is there.
        needed: bytes that it will take.

    Raises:
        OutputError: it exists and is not to be, or must not be, replaced; the disk is too small or not writable.
    """
    work = output.with_name(f"{output.name}.partial")
    if work.is_symlink() or (work.exists() and not (work / LOCK_NAME).is_file()):
        raise OutputError(
            f"{work} is in the way: the work folder of {output} has that name", "rename it, or choose another output"
        )
    place = next(folder for folder in output.parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise OutputError(f"cannot write in {place}", "choose a folder you can write")
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
