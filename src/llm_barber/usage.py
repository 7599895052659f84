"""Memory use of this process, its machine, and versions of libraries."""

import platform
import resource
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from llm_barber.messages import counted


def versions() -> dict[str, str]:
    """Versions that affect a result, of Python and packages, by name."""
    packages = ("llm-barber", "torch", "transformers", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@cache
def _version(package: str) -> str:
    """Version of an installed package; cached, since looking it up reads files."""
    return version(package)


def readable_bytes(size: float, base: int = 1000) -> str:
    """Format a number of bytes with three digits and a unit, decimal or, with `base` 1024, binary.

    Example: 0 -> "0 bytes", 1234 -> "1.23 kB", 45_600_000 -> "45.6 MB", 1536, base=1024 -> "1.5 KiB".
    """
    if abs(size) < base:
        return f"{size:.0f} bytes"
    units = ("kB", "MB", "GB", "TB", "PB", "EB") if base == 1000 else ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    for unit in units:
        size /= base
        if max(abs(size), abs(float(f"{size:.3g}"))) < base or unit == units[-1]:
            break
    return f"{float(f'{size:.3g}'):g} {unit}"


def machine(device: torch.device | None = None) -> str:
    """Name for people of the GPU that computes, or of the processor, with AMX and the number of threads."""
    if device is not None and device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    threads = torch.get_num_threads()
    return f"{_processor()}{' with AMX' if amx else ''}, {counted(threads, 'thread')}"


@cache
def _processor() -> str:
    """Name of the processor, or its architecture where the system does not give the name."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes; on Linux, since `reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory() -> int:
    """Current resident set of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory() -> None:
    """Restart the measurements of `peak_memory`, on Linux only, and of `peak_device_memory`."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_device_memory(device: torch.device) -> int | None:
    """Largest allocation on a CUDA device since `reset_peak_memory`, in bytes; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
