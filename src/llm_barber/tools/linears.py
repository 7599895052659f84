"""The prunable linears of any checkpoint, by the tensors that they lie in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.checkpoint.locations import Location, shape_of
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import BarberError, ModelError
from llm_barber.loading.configuration import load_config
from llm_barber.loading.opening import open_skeleton
from llm_barber.model.architecture import StructureOptions
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.progress import Progress


@dataclass(frozen=True)
class FoundLinear:
    """A prunable linear and its location in the checkpoint.

    The output head belongs to a layer after the last.

    `transposed`: it is stored as (in, out). `copied_from`: the tensor that it shared before it got one of its own, as
    an untied head did. `alias`: another linear has the same weights and is counted instead.
    """

    layer: int
    name: str
    location: Location
    transposed: bool = False
    copied_from: str | None = None
    alias: bool = False

    def weight(self, tensor: Tensor) -> Tensor:
        """The linear's matrix, (out, in), in the tensor that it lies in."""
        matrix = self.location.of(tensor)
        return matrix.t() if self.transposed else matrix


def find_linears(
    source: CheckpointSource, options: StructureOptions, with_head: bool, progress: Progress
) -> dict[str, list[FoundLinear]]:
    """Find the prunable linears, by the tensors that they lie in.

    They are those of `prune`; of a model that it refuses, every matrix inside a numbered layer, with a warning.
    """
    try:
        config = load_config(source)
        architecture = find_architecture(config, options)
        skeleton = open_skeleton(source, config, architecture, torch.device("cpu"), torch.float32)
        linears = _linears_of_layers(source, skeleton)
        if with_head:
            head = _output_head(source, skeleton)
            linears[head.location.tensor] = [head]
        return linears
    except BarberError as error:
        progress.warn(f"every matrix of a numbered layer is counted, since this is no model that prune takes: {error}")
        return _matrices_of_numbered_layers(source)


def _linears_of_layers(source: CheckpointSource, skeleton: Skeleton) -> dict[str, list[FoundLinear]]:
    linears: dict[str, list[FoundLinear]] = {}
    for index in range(len(skeleton.layers)):
        prefix = skeleton.layer_prefix(index)
        for name in skeleton.linears(index):
            location = source.locations.get(f"{prefix}{name}.weight")
            if location is None:
                continue
            linear = FoundLinear(index, name, location, skeleton.architecture.transposed)
            linears.setdefault(location.tensor, []).append(linear)
            for alias in skeleton.other_names(index, name):
                copy = source.locations.get(f"{prefix}{alias}.weight", location)
                if copy != location:
                    linears[copy.tensor] = [replace(linear, name=alias, location=copy, alias=True)]
    return linears


def _output_head(source: CheckpointSource, skeleton: Skeleton) -> FoundLinear:
    location = source.location(f"{skeleton.head_name}.weight")
    embedding = skeleton.model.get_input_embeddings().weight
    tied = next(name for name, parameter in skeleton.model.named_parameters() if parameter is embedding)
    name = skeleton.head_name.rpartition(".")[2]
    return FoundLinear(len(skeleton.layers), name, location, copied_from=source.location(tied).tensor)


def _matrices_of_numbered_layers(source: CheckpointSource) -> dict[str, list[FoundLinear]]:
    """Every matrix inside a numbered layer as a linear, by its tensor."""
    expression = re.compile(r"(?:.*?\.)??(\d+)\.(.+)\.weight")
    matrices = {}
    for name, info in source.tensors.items():
        match = expression.fullmatch(name)
        if match and len(info.shape) == 2 and 0 not in info.shape:
            matrices[name] = [FoundLinear(int(match[1]), match[2], Location(name))]
    return matrices


def check_shapes(source: CheckpointSource, linears: Mapping[str, list[FoundLinear]]) -> None:
    """Check that each tensor has the shape of a linear, (out, in), without a 0.

    Raises:
        ModelError: a tensor has another shape.
    """
    for name, members in linears.items():
        for linear in members:
            shape = source.tensors[name].shape
            part = shape_of(linear.location, shape)
            if part is None or len(part) != 2 or 0 in part:
                raise ModelError(
                    f"{name} of {source.model} has shape {shape}, which is not that of the linear {linear.name}",
                    "config.json and the weights do not belong together, or the file is damaged; get them again",
                )
