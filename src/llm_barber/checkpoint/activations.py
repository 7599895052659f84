"""Files of activations, from which an unfinished run goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llm_barber.checkpoint.durable import save_tensors, sync_file, sync_folder

ACTIVATION_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # the compute dtypes


class Activations(BaseModel):
    """A file of activations: all streams after the first `layers` decoder layers."""

    model_config = ConfigDict(frozen=True)

    layers: int
    file: str
    sha256: str


def save_activations(folder: Path, layers: int, tensors: Mapping[str, Tensor]) -> Activations:
    """Write a file of activations, durably."""
    path = folder / f"activations-{layers:05d}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp")
    save_tensors(tensors, temporary)
    digest = sync_file(temporary)
    temporary.rename(path)
    sync_folder(folder)
    return Activations(layers=layers, file=path.name, sha256=digest)


def newest_activations(folder: Path, saved: Sequence[Activations]) -> tuple[int, dict[str, Tensor], list[str]]:
    """Load the newest file that is whole.

    Returns:
        Number of decoder layers that its activations have passed, 0 if no file is whole; the activations; names of the
        newer files, which are missing or damaged.
    """
    lost: list[str] = []
    for activations in reversed(saved):
        tensors = load_activations(folder, activations)
        if tensors is not None:
            return activations.layers, tensors, lost
        lost.append(activations.file)
    return 0, {}, lost


def load_activations(folder: Path, saved: Activations) -> dict[str, Tensor] | None:
    """The saved activations, mapped from the file; None: the file is missing or damaged.

    `load_file` will not do: it takes as much private memory as the file is large, which a run within a memory limit
    may not have.
    """
    path = folder / saved.file
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != saved.sha256:
                return None
        return _mapped(path)
    except OSError:
        return None


def _mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file that `save_activations` wrote, mapped; they must not be written to."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    content = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[start + first : start + last]
        tensors[name] = data.view(ACTIVATION_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors
