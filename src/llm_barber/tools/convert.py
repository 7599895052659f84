"""Convert pickled weights (`pytorch_model*.bin`) to safetensors, without running code in a pickle."""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from llm_barber.checkpoint.companions import companions
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.checkpoint.untrusted import check_file_name, parse_json
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import ModelError
from llm_barber.progress import Progress, Silent
from llm_barber.settings.base import takes
from llm_barber.settings.tools import ConvertConfig

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
AGAIN = "get the checkpoint again, whole"


class ConvertReport(BaseModel):
    """Number of files read, and of the tensors and bytes in them."""

    model_config = ConfigDict(frozen=True)

    model: str
    output: str
    files: int
    tensors: int
    bytes: int


@takes(ConvertConfig)
def convert(config: ConvertConfig, progress: Progress | None = None) -> ConvertReport:
    """Copy a checkpoint with safetensors in place of pickled weights, with one file in memory at a time.

    PyTorch's `weights_only` loader reads the files: it makes tensors and containers of a pickle and calls nothing else.

    Raises:
        ModelError: no pickled weights, a damaged file, or a file that holds more than tensors.
        OutputError: the output cannot be written.
        HubError: the hub cannot be reached or does not have it.
    """
    progress = progress or Silent()
    folder = resolve_model(config.model, config.revision, pickled=True)
    files = pickled_files(folder, config.model)
    count, size = 0, 0
    needed = sum((folder / file).stat().st_size for file in files)
    with CheckpointWriter(config.output, len(files), config.overwrite, needed) as writer:
        progress.start("converting", len(files))
        for file, expected in files.items():
            tensors = read_pickled(folder / file)
            if expected is not None and expected != tensors.keys():
                name = min(expected ^ tensors.keys())
                raise ModelError(f"{PICKLED_INDEX} and {file} do not agree on {name!r}", AGAIN)
            writer.write_shard(tensors)
            writer.wait_for_shards()
            count += len(tensors)
            size += sum(tensor.nbytes for tensor in tensors.values())
            progress.advance(file)
        for path in companions(folder):
            writer.copy(path, folder)
        writer.finish()
    return ConvertReport(model=config.model, output=str(config.output), files=len(files), tensors=count, bytes=size)


def pickled_files(folder: Path, model: str) -> dict[str, set[str] | None]:
    """List pickled files, all inside the folder, with the tensors of each; None: there is no index.

    Raises:
        ModelError: there are no pickled files, one is missing, or the index is damaged.
    """
    index = folder / PICKLED_INDEX
    if not index.is_file():
        if any(folder.glob("pytorch_model-*.bin")):
            raise ModelError(f"{model} has no {PICKLED_INDEX}, which lists its tensors", AGAIN)
        if not (folder / PICKLED).is_file():
            raise ModelError(f"{model} has no {PICKLED}", hint_without_pickled(folder, model))
        return {PICKLED: None}
    try:
        content = parse_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{PICKLED_INDEX} of {model} cannot be read: {error}", AGAIN) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ModelError(f"{PICKLED_INDEX} of {model} has no weight_map", AGAIN)
    if not weight_map:
        raise ModelError(f"{PICKLED_INDEX} of {model} names no tensors", AGAIN)
    by_file: dict[str, set[str]] = {}
    for tensor, file in sorted(weight_map.items()):
        check_file_name(file, PICKLED_INDEX)
        by_file.setdefault(file, set()).add(tensor)
    for name in by_file:
        if not (folder / name).is_file():
            raise ModelError(f"shard {name} of {model} is missing", AGAIN)
    return dict(by_file)


def hint_without_pickled(folder: Path, model: str) -> str:
    """Say what to do with a model that has no pickled weights."""
    if model.endswith(".gguf"):
        return "`prune` and the other commands read a GGUF file themselves"
    if any(folder.glob("*.safetensors")):
        return "a model with safetensors needs no converting"
    return "save it with save_pretrained()"


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled file, each into memory of its own.

    Raises:
        ModelError: the file cannot be read without running code in it, or holds other things than tensors.
    """
    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything, and the reader's message gives unsafe advice
        raise ModelError(
            f"{path.name} cannot be read safely", "it is damaged, or holds more than weights: do not open it otherwise"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path.name} holds no mapping of names to tensors", AGAIN)
    for name, tensor in content.items():
        if not isinstance(name, str) or name == "__metadata__" or not _is_plain(tensor):
            raise ModelError(f"{path.name} holds {name!r}, which is not a plain tensor", "only weights are converted")
    # Tied tensors share memory, which safetensors refuses; other tensors are views of larger memory.
    return {name: tensor.detach().contiguous().clone() for name, tensor in content.items()}


def _is_plain(tensor: Any) -> bool:
    """True for a dense tensor of a dtype that safetensors has, if its storage holds all of its elements."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )
