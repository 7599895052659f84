"""An opened model with its calibration tokens: layers, their tensors, and their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llm_barber.checkpoint.locations import Location, split_by_bytes
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.opening import layer_locations
from llm_barber.model.architecture import Architecture, Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.skeleton import Skeleton
from llm_barber.parallel.ranks import Ranks
from llm_barber.text.calibration import CalibrationTokens

OUTSIDE_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Job:
    """An opened and checked model, the windows that it is pruned on, and the processes that share them.

    `config`: the language model's part of the configuration. `batch_size`: sequences computed together.
    `prunes_head`: the output head is pruned after the last decoder layer.
    """

    source: CheckpointSource
    config: PreTrainedConfig
    architecture: Architecture
    tokens: CalibrationTokens
    skeleton: Skeleton
    batch_size: int
    ranks: Ranks
    prunes_head: bool = False

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        return len(self.skeleton.layers)

    @cached_property
    def layer_tensors(self) -> list[list[str]]:
        """Names, in the checkpoint, of each decoder layer's tensors."""
        layers = self.layer_prefix(0).removesuffix("0.")
        grouped: list[list[str]] = [[] for _ in range(self.layer_count)]
        for name in self.source.tensors:
            number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
            # Layers for other ends, such as the prediction of several tokens, may follow.
            if number.isdecimal() and int(number) < self.layer_count:
                grouped[int(number)].append(name)
        return grouped

    @cached_property
    def outside_shards(self) -> list[list[str]]:
        """Names of the tensors outside the decoder layers, in groups that are written as one shard each."""
        inside = {name for names in self.steps for name in names}
        outside = [name for name in self.source.tensors if name not in inside]
        return list(split_by_bytes(outside, self.source.tensors, OUTSIDE_SHARD_BYTES))

    @cached_property
    def steps(self) -> list[list[str]]:
        """Names of the tensors that are pruned together: each decoder layer's, then a pruned output head's."""
        if not self.prunes_head:
            return self.layer_tensors
        return [*self.layer_tensors, [] if self.head_is_made else [self.head_location.tensor]]

    @property
    def head_location(self) -> Location:
        """Location of the output head in the checkpoint, or in the output if the checkpoint has none."""
        name = f"{self.skeleton.head_name}.weight"
        return self.source.locations.get(name, Location(name))

    @property
    def head_is_made(self) -> bool:
        """True if the output head is copied from the embedding, since the checkpoint has it under that name only."""
        return self.head_location.tensor not in self.source.tensors

    @property
    def bytes(self) -> int:
        """Size of the output's tensors in bytes."""
        made = 0
        if self.prunes_head and self.head_is_made:
            embedding = next(name for name in self.skeleton.all_outside_names if self.is_head(name))
            made = self.source.tensors[self.source.location(embedding).tensor].bytes
        return self.source.bytes + made

    def is_head(self, name: str) -> bool:
        """Test whether a parameter, by its name in the model, is the output head's matrix."""
        return self.skeleton.model.get_parameter(name) is self.skeleton.head.weight

    def layer_prefix(self, index: int) -> str:
        """Prefix of a layer's names in the checkpoint."""
        name = self.source.location(self.skeleton.layer_prefix(index) + self.skeleton.layer_names(index)[0]).tensor
        return name[: name.index(f".{index}.") + len(f".{index}.")]

    def linears(self, index: int) -> tuple[str, ...]:
        """Prunable linears of a layer, block after block; the output head at the index after the last."""
        if index == self.layer_count:
            return (self.skeleton.head_name.rpartition(".")[2],)
        return self.skeleton.linears(index)

    def blocks(self, index: int) -> Sequence[Block]:
        """Blocks of a layer; none at the index after the last layer, which means the output head."""
        return () if index == self.layer_count else self.skeleton.blocks[index]

    def linear_name(self, index: int, linear: str) -> str:
        """Name, in the model, of a layer's linear or of the output head."""
        if index == self.layer_count:
            return self.skeleton.head_name
        return f"{self.skeleton.layer_prefix(index)}{linear}"

    def moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the device, unless they are there."""
        return {name: tensor.to(self.skeleton.device, non_blocking=True) for name, tensor in tensors.items()}

    def open_layer(self, index: int, tensors: Mapping[str, Tensor]) -> tuple[DecoderLayer, dict[str, Tensor]]:
        """Open a decoder layer; returns it with the weights of its linears by name, (out, in), on the device.

        Args:
            index: of the layer.
            tensors: as they were read, by the checkpoint's names.

        Raises:
            ModelError: a weight is stored twice, with different values.
        """
        skeleton = self.skeleton
        self._check_shared(index, tensors)
        on_device = self.moved(tensors)
        locations = layer_locations(skeleton, self.source, index)
        parameters = {name: location.of(on_device[location.tensor]) for name, location in locations.items()}
        module = skeleton.load_layer(index, parameters)
        arguments = partial(skeleton.arguments, index)
        names = self.linears(index)
        layer = DecoderLayer(module, names, arguments, self.architecture.transposed)
        return layer, {name: self.architecture.convert_layout(parameters[f"{name}.weight"]) for name in names}

    def _other_locations(self, index: int, linear: str) -> list[Location]:
        """Further locations of a linear that has several names in the checkpoint."""
        names = [self.linear_name(index, other) for other in self.skeleton.other_names(index, linear)]
        locations = [self.source.locations.get(f"{name}.weight") for name in names]
        first = self.source.location(f"{self.linear_name(index, linear)}.weight")
        return [location for location in locations if location is not None and location != first]

    def _check_shared(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a linear with several names that is stored under two of them with different values."""
        for name in self.linears(index) if index < self.layer_count else ():
            first = self.source.location(f"{self.linear_name(index, name)}.weight")
            for other in self._other_locations(index, name):
                if not torch.equal(first.of(tensors[first.tensor]), other.of(tensors[other.tensor])):
                    raise ModelError(
                        f"{first.tensor} and {other.tensor} differ, and are one weight in the model",
                        "get the checkpoint again; or, if they are meant to differ, say so in config.json",
                    )

    def stored(self, index: int, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New weights of a layer's linears in the checkpoint's layout, by the checkpoint's names.

        Args:
            index: of the layer.
            weights: (out, in), by linear.
            tensors: as they were read; a tensor that holds several weights is changed in place.
        """
        stored = {}
        for name, weight in weights.items():
            location = self.source.location(f"{self.linear_name(index, name)}.weight")
            weight = self.architecture.convert_layout(weight)
            if location.part is None:
                stored[location.tensor] = weight
                for other in self._other_locations(index, name):
                    stored[other.tensor] = weight.clone()  # safetensors refuses two names of one memory
            else:
                location.of(tensors[location.tensor]).copy_(weight)
                stored[location.tensor] = tensors[location.tensor]
        return stored

    def linear_shapes(self, source: CheckpointSource) -> dict[str, tuple[int, ...]]:
        """Shapes, (out, in), of a checkpoint's prunable linears, by the model's names.

        Raises:
            ModelError: a linear is missing.
        """
        names = [
            f"{self.linear_name(index, linear)}.weight"
            for index in range(self.layer_count)
            for linear in self.linears(index)
        ]
        shapes = {name: source.shape(name) for name in names}
        return {name: shape[::-1] if self.architecture.transposed else shape for name, shape in shapes.items()}
