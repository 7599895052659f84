"""Names of what computes: the card, its driver, and versions of libraries. Nothing in them is the user's."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llm_barber.messages import counted
from llm_barber.usage import machine, versions

DRIVER = Path("/proc/driver/nvidia/version")


def describe_machine(device: torch.device) -> str:
    """Name the processor, or the card with its compute capability, memory, and the number of cards."""
    if device.type != "cuda":
        return machine(device)
    properties = torch.cuda.get_device_properties(device)
    count = torch.cuda.device_count()
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB, {counted(count, 'card')} visible"
    )


def all_versions() -> dict[str, str]:
    """Versions of the system, the driver, CUDA and packages, by name; those that are there."""
    versions_by_name = {**versions(), "system": f"{platform.system()} {platform.machine()}"}
    if torch.version.cuda is not None:
        versions_by_name["CUDA"] = torch.version.cuda
    if torch.version.hip is not None:
        versions_by_name["ROCm"] = torch.version.hip
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        versions_by_name["cuDNN"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    if (driver := driver_version()) is not None:
        versions_by_name["driver"] = driver
    try:
        versions_by_name["triton"] = version("triton")
    except PackageNotFoundError:
        versions_by_name["triton"] = "not installed"
    return versions_by_name


def driver_version(path: Path = DRIVER) -> str | None:
    """Version of NVIDIA's driver, from the file that it keeps on Linux; None: there is no such file.

    Example: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar …" -> "550.54.15".
    """
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8", errors="replace").split()
    return next((word for word in words if word[0].isdigit() and word.replace(".", "").isdigit() and "." in word), None)
