"""Load a pruned checkpoint, packed or not, as an ordinary transformers model; its linears may stay packed in memory."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llm_barber.checkpoint.encoding import Packed, pack, unpack
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.job import load_config
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.model.device import resolve_device

# What transformers keeps of all experts in one parameter, and what of each expert it is made of.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def load(
    model: str | Path, keep_packed: bool = False, dtype: torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """A transformers model with the weights of a checkpoint folder, one tensor after the other.

    Args:
        model: folder (packed or not), hub id or GGUF file.
        keep_packed: keep the matrices of linears that shrink packed in memory, and unpack each when it is used.
        dtype: of the weights; None: the checkpoint's.
        device: as in `prune`; packed linears are unpacked on the CPU.

    Raises:
        ModelError: the checkpoint is damaged, or does not have what its configuration says; `keep_packed` on a device
            that is not the CPU.
        SettingsError: an unknown device.
    """
    source = CheckpointSource(str(model))
    place = resolve_device(device)
    if keep_packed and place.type != "cpu":
        raise ModelError(f"keep_packed is for the CPU, not {place}", "load it dense on this device")
    config = load_config(source)
    if source.model_type in ARCHITECTURES:
        source.stored = ARCHITECTURES[source.model_type].stored
    dtype = dtype or config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    empty.tie_weights()
    prefix = str(empty.base_model_prefix)
    for name in [name for name, _ in empty.named_parameters()]:  # of tied ones the first
        tensor = _read(source, name, tuple(empty.get_parameter(name).shape), prefix)
        path, _, leaf = name.rpartition(".")
        owner = empty.get_submodule(path)
        if tensor.shape != getattr(owner, leaf).shape:
            raise ModelError(
                f"{name} has shape {tuple(tensor.shape)}, the configuration says {tuple(getattr(owner, leaf).shape)}",
                "config.json and the weights do not belong together",
            )
        packed = pack(tensor.to(dtype)) if keep_packed and type(owner) is nn.Linear and leaf == "weight" else None
        if packed is None:
            setattr(owner, leaf, nn.Parameter(tensor.to(place, dtype), requires_grad=False))
        else:
            parent, _, last = path.rpartition(".")
            setattr(empty.get_submodule(parent), last, PackedLinear(packed, owner.bias))
    for path, module in empty.named_modules():
        for leaf in module._buffers.keys() - module._non_persistent_buffers_set:
            key = source.stored(f"{path}.{leaf}")
            if key in source.tensors:
                setattr(module, leaf, source.read([key])[key])
    empty.tie_weights()
    if (source.folder / "generation_config.json").exists():
        empty.generation_config = GenerationConfig.from_pretrained(source.folder)
    return empty.to(place).eval()


def _read(source: CheckpointSource, name: str, shape: tuple[int, ...], base_prefix: str) -> Tensor:
    """A parameter; where the model keeps experts together and the checkpoint does not, theirs one after the other."""
    path, _, leaf = name.rpartition(".")
    if len(shape) < 3 or leaf not in FUSED:
        (tensor,) = source.read_parameters([name], base_prefix).values()
        return tensor
    members = [[f"{path}.{number}.{linear}.weight" for linear in FUSED[leaf]] for number in range(shape[0])]
    found = source.read_parameters([one for expert in members for one in expert], base_prefix)
    return torch.stack([torch.cat([found[one] for one in expert]) for expert in members])


class PackedLinear(nn.Module):
    """A linear whose weight stays packed, and is unpacked into a buffer that all linears of its size share.

    Args:
        packed: its weight, (out, in).
        bias: (out,), or None; it may still be empty.
    """

    values: Tensor
    places: Tensor
    _buffers_by_size: dict[tuple[int, torch.dtype], Tensor] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, packed: Packed, bias: Any) -> None:
        super().__init__()
        self.shape, self.encoding = packed.shape, packed.encoding
        self.register_buffer("values", packed.values)
        self.register_buffer("places", packed.places)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """Unpacked, (out, in); valid until another linear of the same size is used."""
        rows, columns = self.shape
        key = (rows * columns, self.values.dtype)
        if key not in self._buffers_by_size:
            self._buffers_by_size[key] = torch.empty(rows * columns, dtype=self.values.dtype)
        return unpack(Packed(self.shape, self.encoding, self.values, self.places), self._buffers_by_size[key])

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias."""
        return nn.functional.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and encoding."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, encoding={self.encoding}"
