"""Fill a transformers model with the weights of a checkpoint, packed or not, one tensor after the other.

`load` and transformers' `from_pretrained` share this file. Every parameter and buffer gets its value here, or an error
is raised: nothing that transformers initialised at random stays in the model.
"""

import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber.checkpoint.encoding import Encoding, Packed, pack, unpack
from llm_barber.checkpoint.memory import Memory, ordinary_memory
from llm_barber.checkpoint.rounding import Rounded
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.naming import find_locations, unexpected
from llm_barber.loading.opening import check_stored, lacking_buffers
from llm_barber.messages import first_names
from llm_barber.model.empty import empty_model, set_buffer, stored_buffer_names, untie_head
from llm_barber.model.experts import Experts, is_fused
from llm_barber.progress import Progress
from llm_barber.runtime.choice import Choice, KeepPacked
from llm_barber.runtime.huge_pages import HugePages
from llm_barber.runtime.packed_linear import PackedLinear

# Buffers that old checkpoints have, and that transformers computes; it keeps silent about them, too.
COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Filling:
    """Settings for filling a model.

    Attributes:
        dtype: of the weights; those that transformers keeps in float32 are float32.
        device: of the weights; None: each parameter's own.
        keep_packed: which linears stay packed in memory, as in `load`.
        progress: told of each parameter.
        has_buffers: the buffers of the model were computed when it was built.
    """

    dtype: torch.dtype
    device: torch.device | None
    keep_packed: KeepPacked
    progress: Progress
    has_buffers: bool = False


def fill(model: PreTrainedModel, source: CheckpointSource, filling: Filling) -> None:
    """Give a model, built from the checkpoint's configuration, the checkpoint's weights; tie what is tied.

    `model.keep_packed` says afterwards which linears are packed, by name. The output head gets a hook that spares
    copies of its weight.

    Raises:
        SettingsError: `keep_packed` names other linears than the model's, or "auto" is not for this device.
        ModelError: a tensor is missing, damaged, or has another shape than the configuration says.
    """
    # The same model with its buffers, and with each expert by itself, as most checkpoints have them.
    is_split = filling.has_buffers and not any(map(is_fused, model.modules()))
    split = model if is_split else empty_model(model.config, filling.dtype, type(model))
    source.locations = find_locations(split, source.tensors)
    _warn_of_unused(model, source)
    untie_head(model, {name: location.tensor for name, location in source.locations.items()})
    with source.kept_open():
        _fill_buffers(model, source, split, filling)  # before parameters, which a table's initialisation may touch
        model.keep_packed = _fill_parameters(model, source, split, filling)
    model.tie_weights()
    if type(head := model.get_output_embeddings()) is nn.Linear:
        head.register_forward_pre_hook(_join_rows)


def _join_rows(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Give an output head inputs whose rows follow each other in memory.

    A model computes logits of a prompt's last token alone: it cuts (sequences, 1, in) out of (sequences, tokens, in).
    For a weight that takes no gradients PyTorch multiplies such inputs sequence by sequence (`should_fold` in
    aten/src/ATen/native/LinearAlgebra.cpp), and copies the whole transposed weight for that: seconds for a vocabulary
    of 262,144 tokens. The rows alone are a few kilobytes.
    """
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def _warn_of_unused(model: PreTrainedModel, source: CheckpointSource) -> None:
    """Name the checkpoint's tensors that the model has no place for, as when config.json says fewer layers."""
    used = {location.tensor for location in source.locations.values()}
    unused = (name for name in source.tensors if name not in used)
    if names := unexpected(unused, (*COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))):
        warnings.warn(
            f"{type(model).__name__}, as config.json describes it, has no place for {first_names(names)} of "
            f"{source.model}: left out",
            stacklevel=4,
        )


def _fill_parameters(
    model: PreTrainedModel, source: CheckpointSource, split: nn.Module, filling: Filling
) -> dict[str, bool]:
    """Read all parameters; return, by name, whether each linear that may be packed is packed."""
    device = filling.device or next(model.parameters()).device
    choice = Choice(filling.keep_packed, _packable_names(model), device, dtype=filling.dtype)
    in_float32 = _float32_names(model, filling.dtype)
    names = [name for name, _ in model.named_parameters()]  # a tied parameter has its first name here
    pages = HugePages()
    filling.progress.start(f"loading {source.model}", len(names))
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = getattr(owner, leaf)
        device = filling.device or (model.device if empty.is_meta else empty.device)
        dtype = torch.float32 if in_float32 is not None and in_float32.search(name) else empty.dtype
        shape = tuple(empty.shape)
        memory = _final_memory(pages, dtype, device)
        if leaf == "weight" and choice.reads_packed(path):
            read = _read_packed(source, name, shape, dtype, ordinary_memory if choice.is_timed else memory)
            weight = choice.decide(path, read)
        else:
            weight = _read(source, name, shape, split, memory)
        if isinstance(weight, Tensor):
            value = pages.moved(weight.to(device, dtype))
            setattr(owner, leaf, nn.Parameter(value, requires_grad=empty.requires_grad))
        else:
            parent, _, last = path.rpartition(".")
            checked = isinstance(weight, Rounded) or weight.encoding is Encoding.BITMASK  # by `read_packed`
            linear = PackedLinear(weight, owner.bias, dtype, checked)  # the bias follows; it may still be on `meta`
            for buffer_name, buffer in linear.named_buffers(recurse=False):
                setattr(linear, buffer_name, pages.moved(buffer.to(device)))
            linear.prepare()
            setattr(model.get_submodule(parent), last, linear)
        filling.progress.advance(name)
    choice.report()
    return choice.decisions


def _final_memory(pages: HugePages, dtype: torch.dtype, device: torch.device) -> Memory:
    """Memory in huge pages for tensors that stay as they are read; ordinary memory for those that are converted."""

    def memory(shape: tuple[int, ...], stored: torch.dtype) -> Tensor:
        stays = stored == dtype or not stored.is_floating_point
        return pages.empty(shape, stored) if stays else ordinary_memory(shape, stored)

    return memory if device.type == "cpu" else ordinary_memory


def _packable_names(model: PreTrainedModel) -> list[str]:
    """Names of the linears that nothing else shares."""
    modules = list(model.named_modules(remove_duplicate=False))
    uses = Counter(id(module) for _, module in modules)
    first_names = {name for name, _ in model.named_parameters()}  # a tied parameter has its first name here
    return [
        name
        for name, module in modules
        if type(module) is nn.Linear and uses[id(module)] == 1 and f"{name}.weight" in first_names
    ]


def _fill_buffers(model: PreTrainedModel, source: CheckpointSource, split: nn.Module, filling: Filling) -> None:
    """Copy the buffers that the configuration determines; read those that the checkpoint has."""
    for name, buffer in list(split.named_buffers(remove_duplicate=False)):
        set_buffer(model, name, buffer, filling.device or model.get_buffer(name).device)
    # transformers computes tables anew after loading, in float32; a model that was built in bfloat16 has rounded ones.
    for module in model.modules():
        has_parameters = any(parameter is not None for parameter in module._parameters.values())
        module._is_hf_initialized = has_parameters or not module._non_persistent_buffers_set
    model.initialize_weights()
    for name in (name for name in stored_buffer_names(model) if name in source.locations):
        buffer = model.get_buffer(name)
        _check_shape(name, source.shape(name), tuple(buffer.shape))
        set_buffer(model, name, source.read_parameters([name])[name], filling.device or buffer.device)
    if warning := lacking_buffers(model, source):
        warnings.warn(warning, stacklevel=4)


def _float32_names(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names of the parameters that transformers keeps in float32 whatever the model's dtype; None: there are none."""
    plan = model._get_dtype_plan(dtype)
    return re.compile("|".join(f"({name.replace('*', '.*')})" for name in plan)) if plan else None


def _read(source: CheckpointSource, name: str, shape: tuple[int, ...], split: nn.Module, memory: Memory) -> Tensor:
    """Read a parameter into `memory`; stack it from its experts' where `split` has them one by one."""
    path, _, leaf = name.rpartition(".")
    experts = split.get_submodule(path)
    if not isinstance(experts, Experts):
        is_whole = source.location(name).part is None
        check_stored(source, name)
        tensor = source.read_parameters([name], memory if is_whole else ordinary_memory)[name]
        _check_shape(name, tuple(tensor.shape), shape)
        return tensor
    parts = experts.parts(leaf)
    for part in parts:
        check_stored(source, f"{path}.{part.name}", experts)
    tensors = source.read_parameters([f"{path}.{part.name}" for part in parts])
    stacked = memory(shape, next(iter(tensors.values())).dtype)
    for part in parts:
        tensor, place = tensors[f"{path}.{part.name}"], part.of(stacked)
        _check_shape(f"{path}.{part.name}", tuple(tensor.shape), tuple(place.shape))
        place.copy_(tensor)
    return stacked


def _read_packed(
    source: CheckpointSource, name: str, shape: tuple[int, ...], dtype: torch.dtype, memory: Memory
) -> Packed | Rounded | Tensor:
    """Read a linear's weight, packed where that is smaller, into `memory`.

    Rounded values stay as they are, whatever `dtype` is.
    """
    packed = source.read_packed(name, memory)
    if isinstance(packed, Rounded):
        _check_shape(name, packed.packed.shape, shape)
        return packed
    if packed is None:  # it is stored dense, or is a part of a packed stack
        is_never_smaller = bool(source.packed) and source.location(name).part is None  # `pack` has looked at it
        tensor = source.read_parameters([name], memory if is_never_smaller else ordinary_memory)[name]
        _check_shape(name, tuple(tensor.shape), shape)
        return tensor if is_never_smaller and tensor.dtype == dtype else pack(tensor.to(dtype)) or tensor
    _check_shape(name, packed.shape, shape)
    packed = Packed(packed.shape, packed.encoding, packed.values.to(dtype), packed.places)
    return packed if packed.bytes < shape[0] * shape[1] * dtype.itemsize else unpack(packed)


def _check_shape(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if stored != expected:
        raise ModelError(
            f"{name} has shape {stored}, the configuration says {expected}",
            "config.json and the weights do not belong together",
        )
