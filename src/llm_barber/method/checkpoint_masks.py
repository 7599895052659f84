"""Initial masks read off the zeros of a checkpoint that any tool pruned."""

from collections.abc import Mapping

from torch import Tensor, nn

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.digests import files_key
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.job import Job
from llm_barber.loading.naming import find_locations
from llm_barber.masking.find_patterns import find_pattern, holds
from llm_barber.masking.pattern import NofM, parse_pattern
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.record.file import read_record
from llm_barber.record.report import SourceFiles
from llm_barber.record.verification import recorded_order
from llm_barber.settings.presets import Initial

CHANCE = 0.01  # an output head with a larger share of zeros was pruned


class CheckpointMasks:
    """Initial masks read off the zeros of a checkpoint that any tool pruned.

    A weight that is zero in the dense model too says nothing about the mask: it counts as kept and stays where it is.

    `recorded_method`: the initial method by the checkpoint's record; Wanda without a record. `head_was_pruned`: the
    checkpoint's output head was pruned.

    Args:
        job: the opened dense model.
        pruned: folder or hub id of the pruned checkpoint.
        pattern: N:M to keep up, or "unstructured"; None: the record's, or the one found in the zeros.
        revision: of a hub id.

    Raises:
        ModelError: the pruned checkpoint is of another shape or architecture, or is not pruned, or lacks the order of
            its channels.
    """

    def __init__(self, job: Job, pruned: str, pattern: str | None, revision: str | None = None) -> None:
        self.job = job
        self.source = CheckpointSource(pruned, revision)
        self.source.locations = find_locations(job.skeleton.model, self.source.tensors)
        self._check_same_model()
        record = read_record(self.source.folder)
        job.source.order = recorded_order(self.source, record)
        methods = {method.value for method in Initial}
        self.recorded_method = Initial(record.initial) if record and record.initial in methods else Initial.WANDA
        self.head_was_pruned = record.prunes_head if record is not None else self._has_pruned_head()
        self._asked_pattern = pattern
        self._recorded_patterns = {
            (layer.index, linear.name): linear.pattern
            for layer in (record.layers if record else ())
            for linear in layer.linears
        }
        self._first_pattern = self._find_first_pattern()

    def _check_same_model(self) -> None:
        """Refuse a pruned checkpoint whose architecture, layers or linears are not the dense model's."""
        hint = "they must be one model"
        dense, pruned = self.job.source, self.source
        if pruned.model_type != dense.model_type:
            raise ModelError(f"DENSE is {dense.model_type}, PRUNED is {pruned.model_type}", hint)
        dense_layers, pruned_layers = (
            source.configuration.get("text_config", source.configuration).get("num_hidden_layers")
            for source in (dense, pruned)
        )
        if dense_layers != pruned_layers:
            raise ModelError(f"DENSE has {dense_layers} decoder layers, PRUNED {pruned_layers}", hint)
        dense_shapes = self.job.linear_shapes(dense)
        for name, shape in self.job.linear_shapes(pruned).items():
            if shape != dense_shapes[name]:
                raise ModelError(f"{name} is {dense_shapes[name]} in DENSE and {shape} in PRUNED", hint)

    @property
    def method(self) -> None:
        """Initial method; None: the masks are the checkpoint's."""

    @property
    def target(self) -> None:
        """Sparsity or N:M to reach; None: the masks have the checkpoint's sparsity."""

    @property
    def target_words(self) -> str:
        """Pattern of the first layer, for people."""
        return str(self._first_pattern or "unstructured")

    @property
    def has_one_target(self) -> bool:
        """Always False: linears may have been pruned to different patterns."""
        return False

    @property
    def pattern(self) -> NofM | None:
        """N:M of the first layer that is pruned; None: unstructured."""
        return self._first_pattern

    @property
    def granularity(self) -> None:
        """Weights that compete for the masks; None: the masks are read."""

    @property
    def budget(self) -> None:
        """Sparsity that an allocation can spread; None: the checkpoint says how sparse each linear is."""

    def set_sparsities(self, sparsities: Mapping[str, float]) -> None:
        """Refuse sparsities: there is no `budget` to spread.

        Raises:
            TypeError: always.
        """
        raise TypeError("masks of a checkpoint have its sparsities")

    def linears(self, index: int) -> tuple[str, ...]:
        """All prunable linears of a layer: which are pruned is known when they are read."""
        return self.job.linears(index)

    def patterns(self, index: int) -> dict[str, NofM]:
        """Nothing: the masks are read, and their channels keep the checkpoint's order."""
        return {}

    @property
    def source_files(self) -> SourceFiles:
        """The files of the pruned checkpoint that a rebuild reads, its record among them."""
        return SourceFiles(key=pruned_key(self.source), written=self.source.written)

    def _has_pruned_head(self) -> bool:
        """Test whether PRUNED has an output head of its own, with zeros that DENSE's lacks, more than by chance."""
        model = self.job.skeleton.model
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            return False
        names = [name for name, _ in model.named_parameters(remove_duplicate=False) if self.job.is_head(name)]
        locations = [source.locations for source in (self.job.source, self.source)]
        dense, pruned = (next((of[name] for name in reversed(names) if name in of), None) for of in locations)
        if dense is None or pruned is None:
            return False
        if self.source.tensors[pruned.tensor].shape != self.job.source.tensors[dense.tensor].shape:
            return False  # they cannot be compared: the vocabularies differ
        zero = self.source.read([pruned.tensor])[pruned.tensor] == 0
        zero &= self.job.source.read([dense.tensor])[dense.tensor] != 0
        return int(zero.count_nonzero()) > CHANCE * zero.numel()

    def _find_first_pattern(self) -> NofM | None:
        """Pattern of the first layer that is pruned; None: unstructured.

        It decides the default granularity.

        Raises:
            ModelError: no layer is pruned, or all linears are zero.
        """
        some_all_zero = some_left = False
        for index in range(self.job.layer_count):
            patterns = set()
            dense = self._read(index, self.job.linears(index), self.job.source)
            for name, weight in self._read(index, self.job.linears(index)).items():
                nonzero, fixed = weight != 0, dense[name] == 0
                if not nonzero.any():  # it has no pattern
                    some_all_zero = True
                    continue
                some_left = True
                if not (nonzero | fixed).all():
                    patterns.add(self._find_pattern(index, name, nonzero, fixed))
            if patterns:
                return patterns.pop() if len(patterns) == 1 else None
        if some_all_zero and some_left:
            return None
        if some_all_zero:
            raise ModelError(
                f"all linears of {self.source.model} are zero",
                "give the pruned model as PRUNED, and look whether its files are the right ones",
            )
        raise ModelError(
            f"{self.source.model} is not pruned: it has no zeros that DENSE has not",
            "give the pruned model as PRUNED; to prune a dense one: llm-barber prune",
        )

    @property
    def runs_layers(self) -> bool:
        """Always False: the masks are read, and no layer is run for them."""
        return False

    def __call__(
        self,
        index: int,
        layer: DecoderLayer,
        dense: Mapping[str, Tensor],
        streams: ActivationStreams,
        output: str | None = None,
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
        return {names[key]: self.job.architecture.convert_layout(tensor) for key, tensor in tensors.items()}

    def _find_pattern(self, index: int, name: str, nonzero: Tensor, fixed: Tensor) -> NofM | None:
        """Pattern of a linear: the setting's, else the record's if it holds, else the one that its zeros show."""
        if self._asked_pattern == "unstructured":
            return None
        if self._asked_pattern is None:
            recorded = self._recorded_patterns.get((index, name), "")
            if recorded is None:
                return None
            if recorded and holds(parse_pattern(recorded), nonzero):
                return parse_pattern(recorded)
            return find_pattern(nonzero, fixed)
        pattern = parse_pattern(self._asked_pattern)
        if not holds(pattern, nonzero):
            raise ModelError(
                f"pattern {pattern} does not hold in layer {index} {name} of {self.source.model}",
                "leave out --pattern to have it found, or give the one that the model was pruned to",
            )
        return pattern


def pruned_key(source: CheckpointSource) -> str:
    """sha256 of the files that a rebuild reads of a pruned checkpoint: weights, record and order of channels."""
    described_by = [path for path in (source.folder / RECORD_NAME, source.folder / ORDER_NAME) if path.is_file()]
    return files_key({*source.weight_files, *described_by})
