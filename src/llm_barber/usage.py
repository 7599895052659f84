"""What a process has used of memory, and the versions of what it computed with."""

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    packages = ("llm-barber", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


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
    """Start a new measurement of `peak_memory`, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_device_memory(device: torch.device) -> int | None:
    """The largest allocation on a CUDA device so far, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
