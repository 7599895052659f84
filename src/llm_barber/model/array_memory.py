"""Memory for arrays of calibration activations: on the device, in host memory, or in mapped files."""

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass
class ArrayMemory:
    """Allocates arrays: on the device if `on_device`, otherwise in host memory up to `limit`, then in `folder`.

    Args:
        device: the device that computes.
        on_device: whether arrays lie on the device.
        limit: bytes of host memory that all arrays together may take; None: no limit. Further arrays are files.
        folder: the folder of the files; None: that of temporary files.
        used: bytes of host memory that arrays take.
    """

    device: torch.device = CPU
    on_device: bool = False
    limit: int | None = None
    folder: Path | None = None
    used: int = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate an array without initialising it.

        Raises:
            OSError: as `empty_off_device`.
        """
        if self.on_device:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return self.empty_off_device(shape, dtype)

    def empty_off_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate an array in host memory or a file, without initialising it.

        Raises:
            OSError: the array has to be a file, and the disk is full; the error names the folder.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.limit is None or self.used + size <= self.limit:
            array = torch.empty(shape, dtype=dtype, device=CPU)
            self.used += size
            weakref.finalize(array, self._give_back, size)
            return array
        descriptor, path = tempfile.mkstemp(prefix="llm-barber-", suffix=".activations", dir=self.folder)
        try:
            # A full disk raises an error here, not a signal later, on systems with posix_fallocate (not macOS).
            getattr(os, "posix_fallocate", _enlarge)(descriptor, 0, max(1, size))
            return torch.from_file(path, shared=True, size=size // dtype.itemsize, dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(Path(path).parent)) from error
        finally:
            os.close(descriptor)
            os.unlink(path)  # it vanishes once it is not mapped any more, even if the process is killed

    def _give_back(self, size: int) -> None:
        """Count the bytes of an array that is gone as free."""
        self.used -= size


def _enlarge(descriptor: int, start: int, size: int) -> None:
    """Enlarge a file without reserving its blocks, where there is no posix_fallocate."""
    os.ftruncate(descriptor, start + size)
