"""Files of activations, from which an unfinished run goes on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from xxhash import xxh3_128

from llm_barber.checkpoint.durable import sync_folder

ACTIVATION_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # the compute dtypes
PIECE = 2**26  # bytes that are written and made durable together, so that a shard never waits for more


class Activations(BaseModel):
    """A file of activations: all streams after the first `layers` decoder layers.

    `xxh3_128`: digest of the file, which finds accidents; nobody else is to trust the file. `sha256`: the digest that
    earlier versions of the program wrote instead.
    """

    model_config = ConfigDict(frozen=True)

    layers: int
    file: str
    sha256: str = ""
    xxh3_128: str = ""

    def fits(self, path: Path) -> bool:
        """Tell whether a file has the digest."""
        algorithm, digest = (xxh3_128, self.xxh3_128) if self.xxh3_128 else (hashlib.sha256, self.sha256)
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest() == digest  # type: ignore[arg-type]


class StoppedError(Exception):
    """A file of activations is not needed any more."""


def save_activations(folder: Path, layers: int, tensors: Mapping[str, Tensor], stop: Event) -> Activations:
    """Write a file of activations, durably, piece by piece.

    Args:
        folder: the folder of the file.
        layers: number of decoder layers that the activations have passed.
        tensors: contiguous, in host memory; they must not change meanwhile.
        stop: ends the writing between two pieces.

    Raises:
        OSError: the disk is full.
        StoppedError: the writing was ended; a temporary file is left.
    """
    path = folder / f"activations-{layers:05d}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp")
    digest, volatile = xxh3_128(), 0
    with temporary.open("wb") as file:
        for piece in _pieces(tensors):
            if stop.is_set():
                raise StoppedError
            if volatile + len(piece) > PIECE:
                file.flush()
                os.fsync(file.fileno())
                volatile = 0
            file.write(piece)
            digest.update(piece)
            volatile += len(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(folder)
    return Activations(layers=layers, file=path.name, xxh3_128=digest.hexdigest())


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Content of a safetensors file, header first, in pieces of at most `PIECE` bytes."""
    names = {dtype: name for name, dtype in ACTIVATION_DTYPES.items()}
    header, end = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        content = tensor.view(-1).view(torch.uint8).numpy().data
        yield from (content[start : start + PIECE] for start in range(0, len(content), PIECE))


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
        return _mapped(path) if saved.fits(path) else None
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
