"""Load a pruned checkpoint, packed or not, as an ordinary transformers model; its linears may stay packed in memory."""

import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.naming import find_locations
from llm_barber.loading.opening import load_config
from llm_barber.messages import message
from llm_barber.model.buffers import set_buffer, stored_buffer_names
from llm_barber.model.device import resolve_device
from llm_barber.model.empty import auto_class, empty_model, join_tied_linears, untie_head
from llm_barber.model.experts import Experts
from llm_barber.progress import Silent
from llm_barber.record.verification import verify_folder
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.runtime.semi_structured import check_device, convert


def load(
    model: str | Path,
    keep_packed: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    semi_structured: bool = False,
    verify: bool = False,
) -> PreTrainedModel:
    """A transformers model with the weights of a checkpoint folder, one tensor after the other.

    Args:
        model: folder (packed or not), hub id or GGUF file.
        keep_packed: keep the matrices of linears that shrink packed in memory, and unpack each when it is used: less
            memory, and slower (docs/guide/packed.md). On CUDA it is untested on a real GPU.
        dtype: of the weights; None: the checkpoint's.
        device: as in `prune`.
        semi_structured: convert linears that hold 2:4 with PyTorch's `to_sparse_semi_structured`, where dtype and shape
            allow; `model.semi_structured` and a warning say which stay dense and why. Untested on a real GPU.
        verify: compare every file with the record of the run first, which reads the folder once more.

    Raises:
        ModelError: the checkpoint is damaged, or does not have what its configuration says; no linear can be
            semi-structured.
        VerificationError: with `verify`, the folder is not what its record says.
        SettingsError: an unknown device; `semi_structured` without a GPU for it, or with `keep_packed`.
    """
    place = resolve_device(device)
    if semi_structured:
        if keep_packed:
            raise SettingsError(message("{keep_packed} and {semi_structured} exclude each other"), "choose one of them")
        check_device(place, torch.cuda.get_device_capability(place) if place.type == "cuda" else None)
    if keep_packed and place.type == "cuda" and find_spec("triton") is None:
        warnings.warn("without Triton every product unpacks its weight: pip install 'llm-barber[gpu]'", stacklevel=2)
    source = CheckpointSource(str(model))
    if verify:
        verify_folder(source, Silent())
    config = load_config(source)
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        empty: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    empty.tie_weights()
    join_tied_linears(empty)
    split = empty_model(config, dtype)
    source.locations = find_locations(split, source.tensors)
    untie_head(empty, {name: location.tensor for name, location in source.locations.items()})
    names_of = Counter(id(one) for _, one in empty.named_modules(remove_duplicate=False))
    for name in [name for name, _ in empty.named_parameters()]:  # of tied ones the first
        tensor = _read(source, name, tuple(empty.get_parameter(name).shape), split)
        path, _, leaf = name.rpartition(".")
        owner = empty.get_submodule(path)
        if tensor.shape != getattr(owner, leaf).shape:
            raise ModelError(
                f"{name} has shape {tuple(tensor.shape)}, the configuration says {tuple(getattr(owner, leaf).shape)}",
                "config.json and the weights do not belong together",
            )
        packs = keep_packed and type(owner) is nn.Linear and leaf == "weight" and names_of[id(owner)] == 1
        packed = pack(tensor.to(dtype)) if packs else None
        if packed is None:
            setattr(owner, leaf, nn.Parameter(tensor.to(place, dtype), requires_grad=False))
        else:
            parent, _, last = path.rpartition(".")
            setattr(empty.get_submodule(parent), last, PackedLinear(packed, owner.bias))
    for name in stored_buffer_names(empty):
        if name in source.locations:
            set_buffer(empty, name, source.read_parameters([name])[name], place)
    empty.tie_weights()
    if (source.folder / "generation_config.json").exists():
        empty.generation_config = GenerationConfig.from_pretrained(source.folder)
    loaded: PreTrainedModel = empty.to(place).eval()
    if semi_structured:
        loaded.semi_structured = convert(loaded)
    return loaded


def _read(source: CheckpointSource, name: str, shape: tuple[int, ...], split: nn.Module) -> Tensor:
    """A parameter; where the model keeps experts together, put together from theirs, as `split` has them."""
    path, _, leaf = name.rpartition(".")
    experts = split.get_submodule(path)
    if not isinstance(experts, Experts):
        return source.read_parameters([name])[name]
    parts = experts.parts(leaf)
    found = source.read_parameters([f"{path}.{part.name}" for part in parts])
    stacked = torch.empty(shape, dtype=next(iter(found.values())).dtype)
    for part in parts:
        part.of(stacked).copy_(found[f"{path}.{part.name}"])
    return stacked
