"""What a run needs before its first layer, all checked: checkpoint, architecture, calibration tokens, device, plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llm_barber.checkpoint.locations import Location, sharded_by
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.opening import (
    check_positions,
    check_tensors,
    check_vocabulary,
    layer_locations,
    load_config,
    load_tokenizer,
    open_skeleton,
)
from llm_barber.messages import SettingName, message
from llm_barber.model.architecture import Architecture, Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.device import (
    experts_per_token,
    fitting_batch,
    free_device_memory,
    resolve_batch_size,
    resolve_device,
    resolve_dtype,
)
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.parallel.ranks import Ranks, local_rank
from llm_barber.progress import Progress
from llm_barber.settings.presets import Allocation
from llm_barber.settings.run import RunSettings
from llm_barber.settings.targets import Targets
from llm_barber.text.calibration import CalibrationTokens, check_text_fits, load_calibration
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX

OUTSIDE_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Job:
    """A checked run; `config` is the language model's."""

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
        """The checkpoint's tensors of each decoder layer, by the checkpoint's names."""
        layers = self.layer_prefix(0).removesuffix("0.")
        grouped: list[list[str]] = [[] for _ in range(self.layer_count)]
        for name in self.source.tensors:
            number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
            if number.isdecimal() and int(number) < self.layer_count:  # some have layers for other ends after these
                grouped[int(number)].append(name)
        return grouped

    @cached_property
    def outside_shards(self) -> list[list[str]]:
        """The checkpoint's tensors outside the decoder layers, in groups to write together."""
        inside = {name for names in self.steps for name in names}
        outside = [name for name in self.source.tensors if name not in inside]
        return list(sharded_by(outside, self.source.tensors, OUTSIDE_SHARD_BYTES))

    @cached_property
    def steps(self) -> list[list[str]]:
        """What the run prunes together: the tensors of each decoder layer, then those of the output head, if asked."""
        own = [self.head_location.tensor] if self.prunes_head and not self.head_is_made else []
        return [*self.layer_tensors, *([own] if self.prunes_head else [])]

    @property
    def head_location(self) -> Location:
        """Where the checkpoint keeps the output head, or is going to."""
        name = f"{self.skeleton.head_name}.weight"
        return self.source.locations.get(name, Location(name))

    @property
    def head_is_made(self) -> bool:
        """Does the checkpoint have the output head only as the embedding?"""
        return self.head_location.tensor not in self.source.tensors

    @property
    def bytes(self) -> int:
        """Size of the output's tensors."""
        made = 0
        if self.prunes_head and self.head_is_made:
            embedding = next(name for name in self.skeleton.all_outside_names if self.is_head(name))
            made = self.source.tensors[self.source.location(embedding).tensor].bytes
        return self.source.bytes + made

    def is_head(self, name: str) -> bool:
        """Is a parameter, by its name in the model, the output head's matrix?"""
        return self.skeleton.model.get_parameter(name) is self.skeleton.head.weight

    def layer_prefix(self, index: int) -> str:
        """What stands before a layer's names in the checkpoint."""
        found = self.source.location(self.skeleton.layer_prefix(index) + self.skeleton.layer_names(index)[0]).tensor
        return found[: found.index(f".{index}.") + len(f".{index}.")]

    def linears(self, index: int) -> tuple[str, ...]:
        """The prunable linears of a layer, block after block; of the step after the last layer, the output head."""
        if index == self.layer_count:
            return (self.skeleton.head_name.rpartition(".")[2],)
        return self.skeleton.linears(index)

    def blocks(self, index: int) -> Sequence[Block]:
        """The blocks of a layer; of the step after the last layer, none."""
        return () if index == self.layer_count else self.skeleton.blocks[index]

    def linear_name(self, index: int, linear: str) -> str:
        """The name of a layer's linear, or of the output head, in the model."""
        if index == self.layer_count:
            return self.skeleton.head_name
        return f"{self.skeleton.layer_prefix(index)}{linear}"

    def open_layer(self, index: int, tensors: Mapping[str, Tensor]) -> tuple[DecoderLayer, dict[str, Tensor]]:
        """A decoder layer with its weights, and those of its linears by name, (out, in), on the device.

        Args:
            index: which.
            tensors: by the checkpoint's names, as they were read.
        """
        skeleton = self.skeleton
        self._check_shared(index, tensors)
        on_device = {key: tensor.to(skeleton.device, non_blocking=True) for key, tensor in tensors.items()}
        locations = layer_locations(skeleton, self.source, index)
        parameters = {name: location.of(on_device[location.tensor]) for name, location in locations.items()}
        module = skeleton.load_layer(index, parameters)
        arguments = partial(skeleton.arguments, index)
        names = self.linears(index)
        layer = DecoderLayer(module, names, arguments, self.architecture.transposed, skeleton.order)
        return layer, {name: self.architecture.convert_layout(parameters[f"{name}.weight"]) for name in names}

    def _other_locations(self, index: int, linear: str) -> list[Location]:
        """Where else the checkpoint keeps a linear of several names."""
        names = [self.linear_name(index, other) for other in self.skeleton.other_names(index, linear)]
        found = [self.source.locations[f"{name}.weight"] for name in names if f"{name}.weight" in self.source.locations]
        return [
            location
            for location in found
            if location != self.source.location(f"{self.linear_name(index, linear)}.weight")
        ]

    def _check_shared(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a linear of several names that is stored under two of them with different values."""
        for name in self.linears(index) if index < self.layer_count else ():
            first = self.source.location(f"{self.linear_name(index, name)}.weight")
            for also in self._other_locations(index, name):
                if not torch.equal(first.of(tensors[first.tensor]), also.of(tensors[also.tensor])):
                    raise ModelError(
                        f"{first.tensor} and {also.tensor} differ, and are one weight in the model",
                        "get the checkpoint again; or, if they are meant to differ, say so in config.json",
                    )

    def stored(self, index: int, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New weights of a layer's linears, (out, in), as the checkpoint keeps them, by its names.

        Args:
            index: of the layer.
            weights: by linear.
            tensors: as they were read; those that hold several weights are written to.
        """
        found = {}
        for name, weight in weights.items():
            location = self.source.location(f"{self.linear_name(index, name)}.weight")
            weight = self.architecture.convert_layout(weight)
            if location.part is None:
                found[location.tensor] = weight
                for also in self._other_locations(index, name):
                    found[also.tensor] = weight.clone()  # a file holds no memory twice
            else:
                location.of(tensors[location.tensor]).copy_(weight)
                found[location.tensor] = tensors[location.tensor]
        return found

    def linear_shapes(self, source: CheckpointSource) -> dict[str, tuple[int, ...]]:
        """Shapes, (out, in), of all prunable linears in a checkpoint of this architecture, by the model's names.

        Raises:
            ModelError: one is missing.
        """
        names = [
            f"{self.linear_name(index, linear)}.weight"
            for index in range(self.layer_count)
            for linear in self.linears(index)
        ]
        shapes = {name: source.shape(name) for name in names}
        return {name: shape[::-1] if self.architecture.transposed else shape for name, shape in shapes.items()}


def sequences_together(
    settings: RunSettings, skeleton: Skeleton, device: torch.device, sequences: int, seqlen: int, free: int
) -> int:
    """How many sequences are computed together: as many as are asked for, or as suit the device.

    `free`: bytes of memory that it has left, which is asked of a GPU only.
    """
    suits = resolve_batch_size(settings.batch_size, seqlen, sequences, device)
    if settings.batch_size is not None or device.type != "cuda":
        return suits
    chosen = experts_per_token(skeleton.model.config)
    return min(suits, fitting_batch(skeleton.layers, seqlen, free, skeleton.dtype, chosen))


def read_calibration(settings: RunSettings, folder: Path) -> CalibrationTokens:
    """The calibration windows that a run's settings ask for, by the tokenizer of the model in `folder`.

    Raises:
        CalibrationError: unknown, unreadable or too short.
        HubError: the hub is needed and cannot be reached.
    """
    find_tokenizer = partial(load_tokenizer, folder)
    chosen = settings.samples, settings.seqlen, settings.seed, settings.bos
    return load_calibration(settings.calibration, find_tokenizer, *chosen)


def prepare(
    model: str, settings: RunSettings, targets: Targets | None, progress: Progress, ranks: Ranks | None = None
) -> Job:
    """Open and check everything that can be checked before computing.

    Args:
        model: folder, hub id or GGUF file.
        settings: of the run.
        targets: how much of each linear goes; None: not known yet.
        progress: is told.
        ranks: the processes of the run; the first one of each machine is done before the others begin, so that they
            find what it has fetched or converted.

    Raises:
        BarberError: whatever is wrong with the model, the calibration or the device.
    """
    ranks = ranks or Ranks()
    if local_rank():
        ranks.wait()
    job = _prepare(model, settings, targets, progress, ranks)
    if not local_rank():
        ranks.wait()
    return job


def _prepare(model: str, settings: RunSettings, targets: Targets | None, progress: Progress, ranks: Ranks) -> Job:
    if ranks.count > 1 and settings.device.startswith("cuda:"):
        shared = message("{count} processes cannot share {device}", count=ranks.count, device=settings.device)
        raise SettingsError(shared, "leave out --device")
    device = resolve_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif settings.device_memory is not None:
        progress.warn(message("{device_memory} counts for nothing without a GPU; {memory} bounds the host's"))
    dtype = resolve_dtype(settings.dtype, device)
    if ranks.is_first:  # the others write nothing, and may see what the first one is making
        check_output(settings.output, settings.overwrite)
    progress.stage(f"opening {model}")
    source = CheckpointSource(model, settings.revision)
    config = load_config(source)
    architecture = find_architecture(config, settings.structure)
    text_config = config.get_text_config()  # of a model with images the language model's
    if not settings.calibration.endswith(TOKEN_FILE_SUFFIX):  # such a file has its own length
        check_positions(text_config, settings.seqlen)
    if settings.memory is not None:
        check_text_fits(settings.calibration, settings.samples, settings.seqlen, settings.memory)
    progress.stage(f"reading calibration text {settings.calibration}")
    tokens = read_calibration(settings, source.folder)
    sequences, seqlen = tokens.input_ids.shape
    for name, taken in (("samples", sequences), ("seqlen", seqlen)):
        if getattr(settings, name) not in (taken, type(settings).model_fields[name].default):
            unused = (
                "{setting} counts for nothing: {text} has {sequences} windows of {seqlen} tokens, and all are taken"
            )
            setting, text = SettingName(name, str(getattr(settings, name))), settings.calibration
            progress.warn(message(unused, setting=setting, text=text, sequences=sequences, seqlen=seqlen))
    ranks.shares(sequences, 0)  # there are enough
    check_positions(text_config, seqlen)
    check_vocabulary(text_config, tokens.input_ids)
    skeleton = open_skeleton(source, config, architecture, device, dtype)
    prunes_head = settings.prunes_head
    check_tensors(skeleton, source, with_head=settings.allocated_by is Allocation.LOSS or prunes_head)
    free = free_device_memory(device, settings.device_memory) if device.type == "cuda" else 0
    batch_size = sequences_together(settings, skeleton, device, sequences, seqlen, free)
    job = Job(
        source, text_config, architecture, tokens, skeleton, batch_size, ranks, prunes_head,
    )  # fmt: skip
    if prunes_head and any(source.location(one).tensor == job.head_location.tensor for one in skeleton.outside_names):
        raise ModelError(
            f"{model} keeps its embedding as {job.head_location.tensor}, which the pruned output head would be",
            "save it again with transformers' save_pretrained, or leave out --prune-head",
        )
    if ranks.is_first:
        check_output(settings.output, settings.overwrite, job.bytes, settings.resume)
    shapes = job.linear_shapes(source)
    if targets is not None:
        of_layers = [
            [job.linear_name(index, linear) for linear in job.linears(index)] for index in range(job.layer_count)
        ]
        head = {skeleton.head_name: tuple(skeleton.head.weight.shape)} if prunes_head else {}
        targets.check([{name: shapes[f"{name}.weight"] for name in names} for names in of_layers], head)
    return job
