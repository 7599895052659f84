"""Load a pruned checkpoint as a transformers model, with linears dense or packed in memory."""

import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.naming import find_locations
from llm_barber.loading.opening import load_config, load_generation_config
from llm_barber.messages import message
from llm_barber.model.buffers import set_buffer, stored_buffer_names
from llm_barber.model.device import resolve_device
from llm_barber.model.empty import auto_class, empty_model, join_tied_linears, untie_head
from llm_barber.model.experts import Experts
from llm_barber.progress import Progress, Silent
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
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a checkpoint folder as a transformers model, one tensor after the other.

    Args:
        model: folder (packed or not), hub id or GGUF file.
        keep_packed: keep the weights of linears packed in memory where that is smaller: less memory; on CPUs with
            AVX-512 faster decoding, slower prefill (docs/guide/packed.md). On CUDA this is untested on a real GPU.
        dtype: of the weights; None: the checkpoint's.
        device: as in `prune`.
        semi_structured: convert linears that hold 2:4 with PyTorch's `to_sparse_semi_structured`, where dtype and shape
            allow; `model.semi_structured` and a warning say which stay dense and why. Untested on a real GPU.
        verify: compare every file with the record of the run first, which reads the folder once more.
        progress: told of each parameter that is loaded; None: of none.

    Raises:
        ModelError: the checkpoint is damaged, or does not have what its configuration says; no linear can be
            semi-structured.
        VerificationError: with `verify`, the folder differs from its record.
        SettingsError: an unknown device; `semi_structured` without a GPU for it, or with `keep_packed`.
    """
    progress = progress or Silent()
    target = resolve_device(device)
    _check_settings(target, keep_packed, semi_structured)
    source = CheckpointSource(str(model))
    if verify:
        verify_folder(source, progress)
    config = load_config(source)
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        loaded: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    loaded.tie_weights()
    join_tied_linears(loaded)
    split = empty_model(config, dtype)
    source.locations = find_locations(split, source.tensors)
    untie_head(loaded, {name: location.tensor for name, location in source.locations.items()})
    _fill_parameters(loaded, source, split, dtype, target, keep_packed, progress)
    for name in stored_buffer_names(loaded):
        if name in source.locations:
            set_buffer(loaded, name, source.read_parameters([name])[name], target)
    loaded.tie_weights()
    generation_config = load_generation_config(source.folder)
    if generation_config is not None:
        loaded.generation_config = generation_config
    loaded = loaded.to(target).eval()
    if semi_structured:
        loaded.semi_structured = convert(loaded)
    return loaded


def _check_settings(device: torch.device, keep_packed: bool, semi_structured: bool) -> None:
    """Refuse settings that the device does not allow; warn of a slow product."""
    if semi_structured:
        if keep_packed:
            raise SettingsError(message("{keep_packed} and {semi_structured} exclude each other"), "choose one of them")
        check_device(device, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    if keep_packed and device.type == "cuda" and find_spec("triton") is None:
        warnings.warn("without Triton every product unpacks its weight: pip install triton", stacklevel=3)


def _fill_parameters(
    model: PreTrainedModel,
    source: CheckpointSource,
    split: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    keep_packed: bool,
    progress: Progress,
) -> None:
    """Read the parameters of an empty model; `split` is the same model with each expert by itself.

    Raises:
        ModelError: a tensor has another shape than the configuration says.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters()]  # a tied parameter has its first name here
    progress.start(f"loading {source.model}", len(names))
    for name in names:
        tensor = _read(source, name, tuple(model.get_parameter(name).shape), split)
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if tensor.shape != getattr(owner, leaf).shape:
            raise ModelError(
                f"{name} has shape {tuple(tensor.shape)}, the configuration says {tuple(getattr(owner, leaf).shape)}",
                "config.json and the weights do not belong together",
            )
        packs = keep_packed and type(owner) is nn.Linear and leaf == "weight" and uses[id(owner)] == 1
        packed = pack(tensor.to(dtype)) if packs else None  # None, too, where packing saves nothing
        if packed is None:
            setattr(owner, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
        else:
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, PackedLinear(packed, owner.bias))
        progress.advance(name)


def _read(source: CheckpointSource, name: str, shape: tuple[int, ...], split: nn.Module) -> Tensor:
    """Read a parameter; stack it from its experts' where `split` has them one by one."""
    path, _, leaf = name.rpartition(".")
    experts = split.get_submodule(path)
    if not isinstance(experts, Experts):
        return source.read_parameters([name])[name]
    parts = experts.parts(leaf)
    tensors = source.read_parameters([f"{path}.{part.name}" for part in parts])
    stacked = torch.empty(shape, dtype=next(iter(tensors.values())).dtype)
    for part in parts:
        part.of(stacked).copy_(tensors[f"{path}.{part.name}"])
    return stacked
