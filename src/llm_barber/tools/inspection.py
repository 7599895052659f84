"""What is pruned in a checkpoint, and is it what its record, and the dense model, say?"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llm_barber.checkpoint.bits import INTEGERS
from llm_barber.checkpoint.locations import Location, shape_of
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import BarberError, ModelError
from llm_barber.loading.opening import load_config, open_skeleton
from llm_barber.masking.held_patterns import held_patterns, holds
from llm_barber.masking.pattern import parse_pattern
from llm_barber.model.architecture import StructureOptions
from llm_barber.model.structure import find_architecture
from llm_barber.progress import Progress, Silent
from llm_barber.record.file import read_record, recorded_structure
from llm_barber.record.layers import LinearResult
from llm_barber.record.report import KeptWeights
from llm_barber.record.verification import folder_problems
from llm_barber.settings.inspect import InspectConfig


class LinearInspection(BaseModel):
    """A linear as it lies in the checkpoint. `patterns`: the N:M that hold, the smallest N for each M."""

    model_config = ConfigDict(frozen=True)

    name: str
    layer: int
    shape: tuple[int, int]
    zeros: int
    patterns: tuple[str, ...]
    zero_in_dense: int | None = None

    @property
    def weights(self) -> int:
        """Weights of the linear."""
        return self.shape[0] * self.shape[1]


class Inspection(BaseModel):
    """Linears of a checkpoint, and `problems`: what is not as its record or the dense model says.

    `updated`: kept weights that are not the dense model's, where the record has them changed; None: not compared.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    record: bool
    compared_with: str | None
    linears: tuple[LinearInspection, ...]
    problems: tuple[str, ...]
    updated: int | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros in all linears."""
        return sum(linear.zeros for linear in self.linears) / sum(linear.weights for linear in self.linears)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The N:M that hold in every linear."""
        common = set(self.linears[0].patterns).intersection(*(linear.patterns for linear in self.linears))
        return tuple(pattern for pattern in self.linears[0].patterns if pattern in common)


def inspect(config: InspectConfig, progress: Progress | None = None) -> Inspection:
    """Read a checkpoint, tensor by tensor, and check it.

    Raises:
        ModelError: a checkpoint that cannot be read, or has no linears in numbered layers.
        HubError: the hub cannot be reached.
    """
    progress = progress or Silent()
    source = CheckpointSource(config.model, config.revision)
    dense = CheckpointSource(config.dense, config.dense_revision) if config.dense is not None else None
    record = read_record(source.folder)
    with_head = record is not None and record.prunes_head
    linears = find_linears(source, recorded_structure(record), with_head, progress)
    _check_shapes(source, linears)
    if not linears:
        raise ModelError(f"{config.model} has no linears in numbered layers", "is it a decoder model?")
    problems = []
    origins = {}  # the names in the dense model of what it has
    if dense is not None:
        own = dense.tensors.keys()
        made = {
            name: one.made_of for name, found in linears.items() for one in found if one.made_of and name not in own
        }
        origins = {name: made.get(name, name) for name in source.tensors if made.get(name, name) in own}
        problems = _compare_names(source.tensors.keys(), dense.tensors.keys(), origins.keys())
    if record is not None:
        problems += folder_problems(source, record, progress)
        expected = {(layer.index, linear.name): linear for layer in record.layers for linear in layer.linears}
        missing = expected.keys() - {(one.layer, one.name) for found in linears.values() for one in found}
        problems += [f"layer {index} {name} is in the record, not in the checkpoint" for index, name in sorted(missing)]
    names = list(source.tensors if dense is not None else linears)
    progress.start("inspecting", len(names))
    inspected = []
    updates = record is not None and record.kept_weights is not KeptWeights.DENSE
    updated = 0 if updates and dense is not None else None
    for name in names:
        tensor = source.read([name])[name]
        original = dense.read([origins[name]])[origins[name]] if dense is not None and name in origins else None
        for linear in (one for one in linears.get(name, []) if not one.again):
            weight = linear.weight(tensor)
            comparable = original is not None and original.shape == tensor.shape
            before = linear.weight(original) if original is not None and comparable else None
            inspected.append(_inspect_linear(linear, weight, before))
            if record is not None:
                problems += _check_record(inspected[-1], expected.get((linear.layer, linear.name)), weight, updates)
        if original is not None:
            found, differing = _compare_bits(name, tensor, original, may_be_zero=name in linears)
            problems += found
            if updated is not None and name in linears:
                updated += differing
            elif differing:
                problems.append(f"{name} differs from the dense model in {differing} kept weights")
        progress.advance(name)
    return Inspection(
        model=config.model,
        record=record is not None,
        compared_with=config.dense,
        linears=tuple(sorted(inspected, key=lambda linear: linear.layer)),
        problems=tuple(problems),
        updated=updated,
    )


@dataclass(frozen=True)
class FoundLinear:
    """A prunable linear of a layer, or the output head, as if of a layer after the last, and where it lies.

    `turned`: as (in, out). `made_of`: the tensor that it was before it had one of its own, if it was another's.
    `again`: it is a linear of another name, too, under which it is counted.
    """

    layer: int
    name: str
    location: Location
    turned: bool = False
    made_of: str | None = None
    again: bool = False

    def weight(self, tensor: Tensor) -> Tensor:
        """Its matrix, (out, in), in the tensor that it lies in."""
        found = self.location.of(tensor)
        return found.t() if self.turned else found


def find_linears(
    source: CheckpointSource, options: StructureOptions, with_head: bool, progress: Progress
) -> dict[str, list[FoundLinear]]:
    """The prunable linears by the tensors that they lie in.

    As `prune` finds them; of a model that it does not take, every matrix inside a numbered layer, with a warning.
    """
    found: dict[str, list[FoundLinear]] = {}
    try:
        config = load_config(source)
        architecture = find_architecture(config, options)
        skeleton = open_skeleton(source, config, architecture, torch.device("cpu"), torch.float32)
        for index in range(len(skeleton.layers)):
            for linear in skeleton.linears(index):
                location = source.locations.get(f"{skeleton.layer_prefix(index)}{linear}.weight")
                if location is None:
                    continue
                one = FoundLinear(index, linear, location, architecture.transposed)
                found.setdefault(location.tensor, []).append(one)
                for other in skeleton.other_names(index, linear):
                    also = source.locations.get(f"{skeleton.layer_prefix(index)}{other}.weight", location)
                    if also != location:
                        found[also.tensor] = [replace(one, name=other, location=also, again=True)]
        if with_head:
            location = source.location(f"{skeleton.head_name}.weight")
            embedding = skeleton.model.get_input_embeddings().weight
            tied = next(name for name, one in skeleton.model.named_parameters() if one is embedding)
            name = skeleton.head_name.rpartition(".")[2]
            found[location.tensor] = [
                FoundLinear(len(skeleton.layers), name, location, made_of=source.location(tied).tensor)
            ]
        return found
    except BarberError as error:
        progress.warn(f"every matrix of a numbered layer is counted, since this is no model that prune takes: {error}")
        return _matrices_of_numbered_layers(source)


def _matrices_of_numbered_layers(source: CheckpointSource) -> dict[str, list[FoundLinear]]:
    """Every matrix inside a numbered layer, by its tensor."""
    expression = re.compile(r"(?:.*?\.)??(\d+)\.(.+)\.weight")
    matrices = {}
    for name, info in source.tensors.items():
        match = expression.fullmatch(name)
        if match and len(info.shape) == 2 and 0 not in info.shape:
            matrices[name] = [FoundLinear(int(match[1]), match[2], Location(name))]
    return matrices


def _check_shapes(source: CheckpointSource, linears: Mapping[str, list[FoundLinear]]) -> None:
    """Refuse tensors whose shape is that of no linear, which is (out, in), neither of them 0."""
    for name, members in linears.items():
        for linear in members:
            shape = source.tensors[name].shape
            part = shape_of(linear.location, shape)
            if part is None or len(part) != 2 or 0 in part:
                raise ModelError(
                    f"{name} of {source.model} has shape {shape}, which is not that of the linear {linear.name}",
                    "config.json and the weights do not belong together, or the file is damaged; get them again",
                )


def _inspect_linear(linear: FoundLinear, tensor: Tensor, dense: Tensor | None) -> LinearInspection:
    nonzero = tensor != 0
    return LinearInspection(
        name=linear.name,
        layer=linear.layer,
        shape=(tensor.shape[0], tensor.shape[1]),
        zeros=tensor.numel() - int(nonzero.sum()),
        patterns=tuple(str(pattern) for pattern in held_patterns(nonzero, None if dense is None else dense == 0)),
        zero_in_dense=None if dense is None else int((dense == 0).sum()),
    )


def _check_record(found: LinearInspection, expected: LinearResult | None, tensor: Tensor, updates: bool) -> list[str]:
    where = f"layer {found.layer} {found.name}"
    if expected is None:
        return [f"{where} is not in the record"]
    problems = []
    unexplained = expected.zeros - expected.pruned
    if not updates and found.zero_in_dense is not None and unexplained > found.zero_in_dense:
        problems.append(f"{where} has {unexplained} zeros that neither its mask nor the dense model has")
    if found.shape != expected.shape:
        problems.append(f"{where} has shape {found.shape}, the record says {expected.shape}")
    elif found.zeros != expected.zeros:
        problems.append(f"{where} has {found.zeros} zeros, the record says {expected.zeros}")
    if expected.pattern is not None and not holds(parse_pattern(expected.pattern), tensor != 0):
        problems.append(f"{where} does not hold {expected.pattern}, as the record says")
    return problems


def _compare_names(names: Set[str], dense: Set[str], known: Set[str]) -> list[str]:
    """Tensors of one model only; `known` are those whose origin is."""
    problems = []
    for name in sorted(names | dense):
        if name not in names:
            problems.append(f"{name} is in the dense model only")
        elif name not in known:
            problems.append(f"{name} is not in the dense model")
    return problems


def _compare_bits(name: str, tensor: Tensor, dense: Tensor, may_be_zero: bool) -> tuple[list[str], int]:
    """What is wrong, and how many elements are not the dense one bit for bit; of a linear it may be +0.0 instead."""
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype:
        return [
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, in the dense model {tuple(dense.shape)} {dense.dtype}"
        ], 0
    bits, dense_bits = (one.contiguous().view(INTEGERS[one.element_size()]) for one in (tensor, dense))
    differs = bits != dense_bits
    if may_be_zero:
        differs &= bits != 0
        negative_zero = int((differs & (tensor == 0)).sum())
        if negative_zero:
            return [f"{name} has {negative_zero} pruned weights that are -0.0, not +0.0"], 0
    return [], int(differs.sum())
