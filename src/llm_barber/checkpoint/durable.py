"""Write files that are whole or absent after a power failure.

Temporary file → fsync → rename → fsync of the folder.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file. After a crash at any moment it has the old content or the new, whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the user's default permissions.

    safetensors itself would make it readable by its owner alone.

    The file is not durable yet: `sync_file` makes it so.

    Args:
        tensors: contiguous, on the CPU.
        path: of the file.
        metadata: of its header.

    Raises:
        OSError: the disk is full, or another error of the operating system, which safetensors wraps in its own error.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata)
        if path.stat().st_mode != mode:
            path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def sync_file(path: Path) -> str:
    """Make a file's content durable, and return its sha256, which is computed while the disk writes."""
    with path.open("rb") as file, ThreadPoolExecutor(1, "to disk") as pool:
        durable = pool.submit(os.fsync, file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        durable.result()
        return digest


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Tell whether a write failed because the disk is full or the user's quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
