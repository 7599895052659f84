"""Find the weights of a model that a run pruned: by its record, or by their zeros."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.loading.configuration import load_config
from llm_barber.messages import message
from llm_barber.model.structure import find_architecture
from llm_barber.record.file import read_record, recorded_structure
from llm_barber.record.layers import LinearResult
from llm_barber.record.report import RunReport
from llm_barber.runtime.packed_linear import PackedLinear

SHARE = 0.1  # zeros of a pruned matrix, at least; dense models that were quantised once have up to 6 % by nature


@dataclass(frozen=True)
class PrunedWeight:
    """A parameter with pruned weights: its name in the model, its module, and its name there."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the module has now."""
        return self.module.get_parameter(self.leaf)


def find_pruned(model: nn.Module, folder: Path | None, share: float) -> list[PrunedWeight]:
    """Find the parameters of a model that have pruned weights, matrices and stacks of experts' matrices.

    They are the linears that the record of `folder` has as pruned. Without a record they are the matrices with at least
    `share` zeros, except embeddings, matrices that share an embedding's weights and matrices of nothing but zeros.

    Raises:
        SettingsError: linears are packed or on `meta`; `share` is not above 0 and at most 1.
        ModelError: nothing is pruned, the record cannot be read, or the model lacks zeros that the record has.
    """
    if not 0 < share <= 1:
        raise SettingsError(
            message("{share} is {given}: it must be above 0 and at most 1", given=share), "leave it out: it is 0.1 then"
        )
    _refuse_untrainable(model)
    folder = folder or _loaded_from(model)
    weights = None
    if folder is not None:
        record = read_record(folder)
        if record is None:
            raise ModelError(
                f"{folder} has no {RECORD_NAME}", "leave the folder out: matrices with zeros are found without a record"
            )
        weights = _by_record(model, folder, record)
    if weights is None:
        weights = [weight for weight in _matrices(model) if share <= _share(weight.parameter) < 1]
    if not weights:
        raise ModelError(
            f"no matrix of the model has {share:.0%} zeros, so that there is nothing to hold",
            "load the pruned checkpoint, not the dense one; a lower share finds matrices with fewer zeros",
        )
    return weights


def _refuse_untrainable(model: nn.Module) -> None:
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise SettingsError(
            "the model's linears are packed in memory, and packed weights are not trained",
            "load it without keep_packed, or call model.dequantize() first",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SettingsError(
                f"{name} is on the meta device, so that its zeros are not known",
                "load the weights before holding zeros",
            )
        if type(parameter.data) is not Tensor and not hasattr(parameter, "to_local"):
            raise SettingsError(
                f"{name} is stored as {type(parameter.data).__name__}, which is not trained",
                "load the model dense: without semi_structured, and not quantised",
            )


def _loaded_from(model: nn.Module) -> Path | None:
    """The folder with a record from which transformers loaded the model; None: another place, or no record."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if name and (Path(name) / RECORD_NAME).is_file() else None


def _matrices(model: nn.Module) -> Iterator[PrunedWeight]:
    """The floating-point matrices and stacks of matrices of a model, each once, without embeddings."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if _is_matrix(leaf, parameter) and parameter.is_floating_point() and id(parameter) not in embeddings:
                embeddings.add(id(parameter))  # a parameter that modules share is found once
                yield PrunedWeight(f"{path}.{leaf}".removeprefix("."), module, leaf)


def _is_matrix(leaf: str, parameter: Tensor) -> bool:
    """True for a matrix or a stack of matrices; biases of stacked experts have two dimensions, too."""
    return parameter.dim() in (2, 3) and not leaf.endswith("bias")


def _by_record(model: nn.Module, folder: Path, record: RunReport) -> list[PrunedWeight] | None:
    """The parameters in which the record's pruned linears lie; None, with a warning: the model has another structure.

    Raises:
        ModelError: a linear has fewer zeros than the run pruned weights.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    groups: dict[int, tuple[nn.Module, list[LinearResult]]] = {}
    try:
        config = load_config(CheckpointSource(folder))
        layers = _layers(model, find_architecture(config, recorded_structure(record)).layers)
        for layer in record.layers:
            for linear in layer.linears:
                if linear.pruned:
                    for module in _modules(model, layers, layer.index, linear.name):
                        if id(module) not in paths:
                            raise AttributeError(f"{linear.name} is no module of layer {layer.index}")
                        groups.setdefault(id(module), (module, []))[1].append(linear)
    except (AttributeError, IndexError, BarberError) as error:
        warnings.warn(
            f"the model has not the linears of {folder}'s record ({error}): matrices with zeros are held instead",
            stacklevel=4,
        )
        return None
    weights = []
    for module, linears in groups.values():
        path = paths[id(module)]
        members = [
            PrunedWeight(f"{path}.{leaf}".removeprefix("."), module, leaf)
            for leaf, parameter in module.named_parameters(recurse=False)
            if _is_matrix(leaf, parameter)
        ]
        for weight in members:
            if not weight.parameter.is_floating_point():
                raise SettingsError(
                    f"{weight.name} is quantised ({weight.parameter.dtype}), so that its zeros cannot be held",
                    "load the checkpoint in bfloat16 or float32",
                )
        pruned = sum(linear.pruned for linear in linears)
        zeros = sum(count_zeros(weight.parameter) for weight in members)
        if zeros < pruned:
            raise ModelError(
                f"{path} has {zeros:,} zeros, and the run of {folder} pruned {pruned:,} of its weights",
                "load the weights of that folder; zeros that training has filled do not come back",
            )
        weights += members
    return weights


def _layers(model: nn.Module, path: str) -> nn.Module:
    """The decoder layers of a model, whose class may have them at a longer or shorter path."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name
        if f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}")
    ]
    if len(lists) != 1:
        raise AttributeError(f"it has {len(lists)} lists of layers at {path}")
    return lists[0][1]


def _modules(model: nn.Module, layers: nn.Module, index: int, name: str) -> list[nn.Module]:
    """The modules that have the weights of a recorded linear: the linear, or the experts that are stacked in one.

    PEFT keeps a linear that it trains whole beside the linear before.
    """
    module: nn.Module
    if index == len(layers):  # type: ignore[arg-type]
        module = model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            raise AttributeError("it has no output head")
        return _copies(module)
    module = layers[index]  # type: ignore[index]
    for part in name.split("."):
        (module, *_) = _copies(module)
        if part.isdigit() and not hasattr(module, part):
            return [module]  # transformers stacks what the record has one by one
        module = getattr(module, part)
    return _copies(module)


def _copies(module: nn.Module) -> list[nn.Module]:
    """The modules inside of what PEFT wraps around a module, the original one first; others are themselves."""
    if isinstance(saved := getattr(module, "modules_to_save", None), nn.ModuleDict):
        return [module.get_submodule("original_module"), *saved.values()]
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return [module]


def local_part(tensor: Tensor) -> Tensor:
    """The elements that this process has, without their gradient; of an ordinary tensor all of them."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def count_zeros(tensor: Tensor) -> int:
    """Number of zeros of a tensor, over all processes that share it: each of them must call this."""
    zeros = (tensor.detach() == 0).sum()
    return int(zeros.full_tensor() if hasattr(zeros, "full_tensor") else zeros)


def _share(parameter: Tensor) -> float:
    with torch.no_grad():
        return count_zeros(parameter) / max(1, parameter.numel())
