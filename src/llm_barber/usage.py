"""What a process has used of memory, and the versions of what it computed with."""

import platform
import resource
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    packages = ("llm-barber", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@cache
def _version(package: str) -> str:
    return version(package)  # reads files


def readable_bytes(size: float, base: int = 1000) -> str:
    """A number of bytes with three digits and a unit, decimal or, with `base` 1024, binary.

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
    """The GPU, if that is what computes, or the processor, and the number of threads, for people."""
    if device is not None and device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    threads = torch.get_num_threads()
    return f"{_processor()}{' with AMX' if amx else ''}, {threads} thread{'s' if threads > 1 else ''}"


@cache
def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes (since `reset_peak_memory`, on Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory() -> int:
    """The resident set of this process now, in bytes; where the system does not say, the largest so far."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else peak_memory()


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory`, where the system can (Linux), and of `peak_device_memory`."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_device_memory(device: torch.device) -> int | None:
    """The largest allocation on a CUDA device so far (since `reset_peak_memory`), in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
