"""The copy of a pruned checkpoint that has a trained model's weights: its tensors, what changed, and its record."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_barber.checkpoint.bits import INTEGERS
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.digests import DIGEST
from llm_barber.checkpoint.locations import Location, Part, shape_of
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.untrusted import read_json
from llm_barber.errors import ModelError, NotFiniteError, VerificationError
from llm_barber.loading.naming import find_locations
from llm_barber.model.empty import empty_model
from llm_barber.model.experts import Experts
from llm_barber.record.finetuning import FineTuning
from llm_barber.record.report import KeptWeights, RunReport
from llm_barber.tools.linears import FoundLinear
from llm_barber.tools.rounded_packing import with_zeros
from llm_barber.usage import versions

NO_FOLDER = "name the folder of the pruned checkpoint: pruned=FOLDER"


class TrainedModel:
    """A trained model's weights by the tensors of the checkpoint that was trained.

    Args:
        model: of transformers; its parameters may be shared by processes.
        source: the pruned checkpoint.

    Raises:
        ModelError: a parameter has another shape in the checkpoint, or is not in it.
    """

    def __init__(self, model: PreTrainedModel, source: CheckpointSource) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self.source = source
        split = empty_model(model.config, torch.float32, type(model))  # the same model with each expert by itself
        source.locations = find_locations(split, source.tensors)
        parts = {
            f"{path}.{part.name}": (f"{path}.{leaf}", part)
            for path, module in split.named_modules()
            if isinstance(module, Experts)
            for leaf, _ in model.get_submodule(path).named_parameters(recurse=False)
            for part in module.parts(leaf)
        }
        # By tensor of the checkpoint: its parameters, each with the part of the model's parameter and the location.
        self._members: dict[str, list[tuple[str, Part | None, Location]]] = {}
        for name, location in source.locations.items():
            parameter, part = parts.get(name, (name, None))
            if parameter in self._parameters:
                self._check_shape(parameter, part, name)
                self._members.setdefault(location.tensor, []).append((parameter, part, location))
        covered = {id(self._parameters[name]) for members in self._members.values() for name, *_ in members}
        lost = [name for name, parameter in self._parameters.items() if id(parameter) not in covered]
        if lost:
            raise ModelError(
                f"{source.model} has no {lost[0]}, which the model has",
                "name the checkpoint that was trained: pruned=FOLDER; a model with parts of its own is written by "
                "model.save_pretrained()",
            )
        self._not_gathered = source.shards

    def _check_shape(self, parameter: str, part: Part | None, name: str) -> None:
        shape = shape_of(Location(parameter, part), tuple(self._parameters[parameter].shape))
        if shape != self.source.shape(name):
            raise ModelError(f"{name} has shape {shape}, in {self.source.model} {self.source.shape(name)}", NO_FOLDER)

    def shard(self, file: str, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a shard with the trained values, on the CPU, in the checkpoint's dtypes.

        Processes that share the parameters gather them together: those that write nothing call `gather_rest`.

        Args:
            file: name of the shard.
            before: its tensors in the checkpoint.

        Raises:
            NotFiniteError: a trained value is NaN or Inf.
        """
        self._not_gathered.remove(file)
        tensors = {name: tensor.clone() for name, tensor in before.items()}
        for name, location, value in self._values(file):
            location.of(tensors[name]).copy_(value)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(
                    f"{name} holds NaN or Inf after training",
                    "train again with a lower rate, or in bfloat16 or float32",
                )
        return tensors

    def gather_rest(self) -> None:
        """Take part in gathering the parameters of all shards that were not asked for."""
        for file in self._not_gathered:
            for _ in self._values(file):
                pass
        self._not_gathered = []

    def _values(self, file: str) -> Iterator[tuple[str, Location, Tensor]]:
        """Tensor, location and trained values of each parameter of a shard."""
        gathered: dict[str, Tensor] = {}  # of the last module: experts in its stacks come one after the other
        for name, info in self.source.tensors.items():
            for parameter, part, location in self._members.get(name, ()) if info.file == file else ():
                if parameter not in gathered:
                    module = parameter.rpartition(".")[0]
                    gathered = {key: values for key, values in gathered.items() if key.rpartition(".")[0] == module}
                    gathered[parameter] = _whole(self._parameters[parameter])
                yield name, location, gathered[parameter] if part is None else part.of(gathered[parameter])


def _whole(parameter: Tensor) -> Tensor:
    """All elements of a parameter; processes that share it gather them together."""
    values: Any = parameter.detach()
    full: Tensor = values.full_tensor() if hasattr(values, "full_tensor") else values
    return full


@dataclass
class TrainedCopy:
    """A comparison of a pruned checkpoint with its trained copy, and the copy's record.

    Attributes:
        linears: prunable linears, by the tensors that they lie in.
        record: of the pruned checkpoint.
        changed: names of the tensors that differ.
        zeros: of each linear of the copy, by layer and name.
        filled: pruned weights of each linear that are not zero any more, by layer and name.
    """

    linears: Mapping[str, list[FoundLinear]]
    record: RunReport
    changed: set[str] = field(default_factory=set)
    zeros: dict[tuple[int, str], int] = field(default_factory=dict)
    filled: dict[tuple[int, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pruned = {
            (layer.index, linear.name) for layer in self.record.layers for linear in layer.linears if linear.pruned
        }

    def compare(self, name: str, before: Tensor, after: Tensor) -> None:
        """Note what changed in a tensor; -0.0 in place of a zero of a pruned linear becomes 0.0."""
        for linear in self.linears.get(name, []):
            if linear.alias:
                continue
            key = (linear.layer, linear.name)
            old, new = linear.weight(before), linear.weight(after)
            if key in self._pruned:
                if filled := int(((old == 0) & (new != 0)).sum()):
                    self.filled[key] = filled
                new.masked_fill_(new == 0, 0)
            self.zeros[key] = int((new == 0).sum())
        bits = INTEGERS[before.element_size()]
        if not torch.equal(before.contiguous().view(bits), after.contiguous().view(bits)):
            self.changed.add(name)

    def refuse_filled(self) -> None:
        """Raise an error if pruned weights are not zero, or if nothing changed.

        Raises:
            VerificationError: pruned weights were trained.
            ModelError: all tensors are those of the pruned checkpoint.
        """
        if self.filled:
            (layer, name), _ = min(self.filled.items())
            raise VerificationError(
                f"{sum(self.filled.values()):,} pruned weights are not zero any more, first in layer {layer} {name}",
                "train with llm_barber.hold_zeros(model), from the pruned checkpoint on",
            )
        if not self.changed:
            raise ModelError("no weight differs from the pruned checkpoint", "train the model first")

    def amended(self, source: CheckpointSource, output: Path, files: Mapping[str, str]) -> RunReport:
        """The record of the copy: its files, its zeros, and the fine-tuning."""
        before = self.record.fine_tuning
        fine_tuning = FineTuning(
            pruned=source.model,
            record=str(read_json(source.folder / RECORD_NAME)[DIGEST]),
            tensors=tuple(sorted(self.changed | set(before.tensors if before is not None else ()))),
            versions=versions(),
            others_are_dense=self.record.linears_are_dense,
        )
        return self.record.model_copy(
            update={
                "output": str(output),
                "files": dict(files),
                "layers": tuple(with_zeros(layer, self.zeros) for layer in self.record.layers),
                "kept_weights": KeptWeights.FINE_TUNED,
                "rounding": None,
                "fine_tuning": fine_tuning,
            }
        )
