"""Initial masks read off the zeros of a checkpoint that any tool pruned."""

from collections.abc import Mapping

from torch import Tensor, nn

from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.digests import files_key
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.job import Job
from llm_barber.loading.naming import find_locations
from llm_barber.masking.held_patterns import find_pattern, holds
from llm_barber.masking.pattern import NofM, parse_pattern
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.record.file import read_record
from llm_barber.record.report import SourceFiles
from llm_barber.settings.initial import Initial

CHANCE = 0.01  # of an output head's weights: more zeros than that have been pruned


class CheckpointMasks:
    """Initial masks read off the zeros of a checkpoint that any tool pruned.

    A weight that is zero in the dense model too says nothing about the mask: it counts as kept and stays where it is.

    Raises:
        ModelError: the pruned checkpoint is of another shape or architecture, or is not pruned.
    """

    def __init__(self, job: Job, pruned: str, pattern: str | None, revision: str | None = None) -> None:
        self.job = job
        self.source = CheckpointSource(pruned, revision)
        self.source.locations = find_locations(job.skeleton.model, self.source.tensors)
        if self.source.model_type != job.source.model_type:
            raise ModelError(
                f"DENSE is {job.source.model_type}, PRUNED is {self.source.model_type}", "they must be one model"
            )
        configurations = [one.configuration.get("text_config", one.configuration) for one in (job.source, self.source)]
        counts = [one.get("num_hidden_layers") for one in configurations]
        if counts[0] != counts[1]:
            raise ModelError(f"DENSE has {counts[0]} decoder layers, PRUNED {counts[1]}", "they must be one model")
        dense_shapes = job.linear_shapes(job.source)
        for name, shape in job.linear_shapes(self.source).items():
            if shape != dense_shapes[name]:
                raise ModelError(
                    f"{name} is {dense_shapes[name]} in DENSE and {shape} in PRUNED", "they must be one model"
                )
        record = read_record(self.source.folder)
        methods = {method.value for method in Initial}
        self.recorded_method = Initial(record.initial) if record and record.initial in methods else Initial.WANDA
        self.head_was_pruned = record.prunes_head if record is not None else self._has_pruned_head()
        self.pattern = pattern
        self.recorded = {
            (layer.index, linear.name): linear.pattern
            for layer in (record.layers if record else ())
            for linear in layer.linears
        }
        self.first_pattern = self._look_at_first_layer()

    @property
    def source_files(self) -> SourceFiles:
        """The files of the pruned checkpoint that a rebuild reads, its record among them."""
        return SourceFiles(key=pruned_key(self.source), written=self.source.written)

    def _has_pruned_head(self) -> bool:
        """Has its output head, of its own, zeros that DENSE's has not, and more than come by chance?"""
        model = self.job.skeleton.model
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            return False
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if self.job.is_head(name)]
        locations = [source.locations for source in (self.job.source, self.source)]
        dense, own = (next((of[name] for name in reversed(names) if name in of), None) for of in locations)
        if (
            dense is None
            or own is None
            or self.source.tensors[own.tensor].shape != self.job.source.tensors[dense.tensor].shape
        ):
            return False  # not to be compared: one may have more tokens
        zero = self.source.read([own.tensor])[own.tensor] == 0
        zero &= self.job.source.read([dense.tensor])[dense.tensor] != 0
        return int(zero.count_nonzero()) > CHANCE * zero.numel()

    def _look_at_first_layer(self) -> NofM | None:
        """The pattern of the first layer that is pruned, which decides the default granularity.

        Raises:
            ModelError: none is.
        """
        gone = kept = False
        for index in range(self.job.layer_count):
            patterns = set()
            dense = self._read(index, self.job.linears(index), self.job.source)
            for name, weight in self._read(index, self.job.linears(index)).items():
                nonzero, fixed = weight != 0, dense[name] == 0
                if not nonzero.any():  # it has no pattern
                    gone = True
                    continue
                kept = True
                if not (nonzero | fixed).all():
                    patterns.add(self._find_pattern(index, name, nonzero, fixed))
            if patterns:
                return patterns.pop() if len(patterns) == 1 else None
        if gone and kept:
            return None
        if gone:
            raise ModelError(f"all linears of {self.source.model} are zero", "is it PRUNED?")
        raise ModelError(
            f"{self.source.model} is not pruned: it has no zeros that DENSE has not",
            "give the pruned model as PRUNED; to prune a dense one: llm-barber prune",
        )

    def __call__(
        self, index: int, layer: DecoderLayer, dense: Mapping[str, Tensor], streams: ActivationStreams
    ) -> dict[str, PrunedLinear]:
        """One `PrunedLinear` for each linear in `dense` that is pruned."""
        result = {}
        for name, weight in self._read(index, tuple(dense)).items():
            pruned = weight.to(dense[name].device)
            fixed = dense[name] == 0
            keep = (pruned != 0) | fixed
            if keep.all():
                continue
            pattern = self._find_pattern(index, name, pruned != 0, fixed)
            result[name] = PrunedLinear(keep, pruned, dense[name], pattern, fixed)
        return result

    def _read(self, index: int, linears: tuple[str, ...], source: CheckpointSource | None = None) -> dict[str, Tensor]:
        source = source or self.source
        prefix = self.job.skeleton.layer_prefix(index)
        names = {f"{prefix}{name}.weight": name for name in linears}
        tensors = source.read_parameters(names)
        return {names[key]: self.job.architecture.turned(tensor) for key, tensor in tensors.items()}

    def _find_pattern(self, index: int, name: str, nonzero: Tensor, fixed: Tensor) -> NofM | None:
        """The pattern of a linear: the one asked for, else the record's, else what is found in its zeros."""
        if self.pattern == "unstructured":
            return None
        if self.pattern is None:
            recorded = self.recorded.get((index, name), "")
            if recorded is None:
                return None
            own = parse_pattern(recorded) if recorded else None
            return own if own is not None and holds(own, nonzero) else find_pattern(nonzero, fixed)
        asked = parse_pattern(self.pattern)
        if not holds(asked, nonzero):
            raise ModelError(
                f"pattern {asked} does not hold in layer {index} {name} of {self.source.model}",
                "leave out --pattern to have it found, or give the one that the model was pruned to",
            )
        return asked


def pruned_key(source: CheckpointSource) -> str:
    """sha256 that tells the files that a rebuild reads of a pruned checkpoint, its record among them, from others."""
    record = source.folder / RECORD_NAME
    return files_key({*source.weight_files, *([record] if record.is_file() else [])})
