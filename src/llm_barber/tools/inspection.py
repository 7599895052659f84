"""Inspect a checkpoint: count zeros, find patterns, compare it with its record and the dense model."""

from collections.abc import Mapping, Set

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llm_barber.checkpoint.bits import INTEGERS
from llm_barber.checkpoint.channel_order import read_order
from llm_barber.checkpoint.hub import warn_of_revision
from llm_barber.checkpoint.rounding import round_trip
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.masking.find_patterns import find_patterns, holds
from llm_barber.masking.pattern import parse_pattern
from llm_barber.progress import Progress, Silent
from llm_barber.record.file import read_record, recorded_structure
from llm_barber.record.layers import LinearResult
from llm_barber.record.report import KeptWeights, RunReport
from llm_barber.record.rounding import Rounding, rounding_of
from llm_barber.record.verification import folder_problems
from llm_barber.settings.base import takes
from llm_barber.settings.tools import InspectConfig
from llm_barber.tools.linears import FoundLinear, check_shapes, find_linears


class LinearInspection(BaseModel):
    """A linear of the checkpoint.

    `patterns`: the N:M that hold, the smallest N for each M. `zero_in_dense`: weights that are zero in the dense model;
    None: not compared.
    """

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
    """Linears of a checkpoint, and `problems`: differences from its record and from the dense model.

    `updated`: kept weights that differ from the dense model's, where the record says that the run updated them; None:
    not compared. `rounding`: of the kept weights, by which dense weights are rounded before they are compared.
    `fine_tuned`: number of tensors that were trained after the run, as the record has it. `reordered`: channels of the
    dense model were put in the checkpoint's order before they were compared.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    record: bool
    compared_with: str | None
    linears: tuple[LinearInspection, ...]
    problems: tuple[str, ...]
    updated: int | None = None
    rounding: Rounding | None = None
    fine_tuned: int = 0
    reordered: bool = False

    @property
    def sparsity(self) -> float:
        """Share of zeros in all linears."""
        return sum(linear.zeros for linear in self.linears) / sum(linear.weights for linear in self.linears)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The N:M that hold in every linear."""
        common = set(self.linears[0].patterns).intersection(*(linear.patterns for linear in self.linears))
        return tuple(pattern for pattern in self.linears[0].patterns if pattern in common)


@takes(InspectConfig)
def inspect(config: InspectConfig, progress: Progress | None = None) -> Inspection:
    """Read a checkpoint, tensor by tensor, and check it.

    Raises:
        ModelError: the checkpoint cannot be read, or has no linears in numbered layers.
        HubError: the hub cannot be reached.
    """
    progress = progress or Silent()
    warn_of_revision("revision", config.revision, config.model, progress)
    source = CheckpointSource(config.model, config.revision)
    dense = _open_dense(config, source, progress)
    record = read_record(source.folder)
    with_head = record is not None and record.prunes_head
    linears = find_linears(source, recorded_structure(record), with_head, progress)
    check_shapes(source, linears)
    if not linears:
        raise ModelError(f"{config.model} has no linears in numbered layers", "is it a decoder model?")
    problems: list[str] = []
    origins: dict[str, str] = {}
    if dense is not None:
        origins = _names_in_dense(source, dense, linears)
        problems += _compare_names(source.tensors.keys(), dense.tensors.keys(), origins.keys())
    recorded: dict[tuple[int, str], LinearResult] = {}
    if record is not None:
        problems += folder_problems(source, record, progress)
        recorded = {(layer.index, linear.name): linear for layer in record.layers for linear in layer.linears}
        problems += _missing_linears(recorded.keys(), linears)
    rounding = rounding_of(source) if record is None else record.rounding
    not_linears = () if dense is None else [name for name in source.tensors if name not in linears]
    names = [*linears, *not_linears]
    progress.start("inspecting", len(names))
    inspected = []
    trained, may_differ = _trained(record), _may_differ(record, linears.keys())
    updates = record is not None and record.kept_weights is not KeptWeights.DENSE
    updated = 0 if updates and dense is not None else None
    for name in names:
        tensor = source.read([name])[name]
        original = dense.read([origins[name]])[origins[name]] if dense is not None and name in origins else None
        changed = name in may_differ or _is_rounded(name, rounding)
        for linear in (member for member in linears.get(name, []) if not member.alias):
            weight = linear.weight(tensor)
            comparable = original is not None and original.shape == tensor.shape
            before = linear.weight(original) if original is not None and comparable else None
            inspected.append(_inspect_linear(linear, weight, before))
            if record is not None:
                problems += _check_record(inspected[-1], recorded.get((linear.layer, linear.name)), weight, changed)
        if original is not None:
            expected = _rounded(name, original, tensor, rounding)
            differences, differing = _compare_bits(name, tensor, expected, may_be_zero=name in linears)
            problems += differences
            if updated is not None and name in linears and name in may_differ:
                updated += differing
            elif differing and name not in may_differ:
                problems.append(f"{name} differs from the dense model in {differing} kept weights")
        progress.advance(name)
    return Inspection(
        model=config.model, record=record is not None, compared_with=config.dense,
        linears=tuple(sorted(inspected, key=lambda linear: linear.layer)), problems=tuple(problems), updated=updated,
        rounding=rounding, fine_tuned=len(trained), reordered=dense is not None and dense.order is not None,
    )  # fmt: skip


def _open_dense(config: InspectConfig, source: CheckpointSource, progress: Progress) -> CheckpointSource | None:
    """Open the dense model to compare with, if there is one, in the order of the checkpoint's channels.

    A model with the same file of an order has them there already: both were made from one dense model.
    """
    if config.dense is None:
        return None
    warn_of_revision("dense_revision", config.dense_revision, config.dense, progress)
    dense = CheckpointSource(config.dense, config.dense_revision)
    order = read_order(source.folder)
    dense.order = None if order == read_order(dense.folder) else order
    return dense


def _trained(record: RunReport | None) -> Set[str]:
    """Names of the tensors that were fine-tuned after the run, which differ from the dense model's."""
    return set() if record is None or record.fine_tuning is None else set(record.fine_tuning.tensors)


def _may_differ(record: RunReport | None, linears: Set[str]) -> Set[str]:
    """Names of the tensors whose kept weights may differ from the dense model's, by the record."""
    if record is None or record.kept_weights is KeptWeights.DENSE:
        return set()
    if record.fine_tuning is None or not record.fine_tuning.others_are_dense:
        return _trained(record) | linears
    return _trained(record)


def _is_rounded(name: str, rounding: Rounding | None) -> bool:
    return rounding is not None and name in rounding.errors


def _rounded(name: str, dense: Tensor, tensor: Tensor, rounding: Rounding | None) -> Tensor:
    """The dense tensor; if it was rounded, with the weights that are kept in `tensor` rounded in the same way."""
    if rounding is None or name not in rounding.errors or dense.shape != tensor.shape or dense.dtype != tensor.dtype:
        return dense
    kept = dense.masked_fill(tensor == 0, 0)
    return round_trip(kept.view(-1, kept.shape[-1]), rounding.group).view(dense.shape)


def _names_in_dense(
    source: CheckpointSource, dense: CheckpointSource, linears: Mapping[str, list[FoundLinear]]
) -> dict[str, str]:
    """Map the checkpoint's tensors to those of the dense model; an untied head to the embedding."""
    copied_from = {
        name: linear.copied_from for name, members in linears.items() for linear in members if linear.copied_from
    }
    names = {name: name if name in dense.tensors else copied_from.get(name, name) for name in source.tensors}
    return {name: origin for name, origin in names.items() if origin in dense.tensors}


def _missing_linears(recorded: Set[tuple[int, str]], linears: Mapping[str, list[FoundLinear]]) -> list[str]:
    present = {(linear.layer, linear.name) for members in linears.values() for linear in members}
    return [
        f"layer {index} {name} is in the record, not in the checkpoint" for index, name in sorted(recorded - present)
    ]


def _inspect_linear(linear: FoundLinear, tensor: Tensor, dense: Tensor | None) -> LinearInspection:
    nonzero = tensor != 0
    return LinearInspection(
        name=linear.name,
        layer=linear.layer,
        shape=(tensor.shape[0], tensor.shape[1]),
        zeros=tensor.numel() - int(nonzero.sum()),
        patterns=tuple(str(pattern) for pattern in find_patterns(nonzero, None if dense is None else dense == 0)),
        zero_in_dense=None if dense is None else int((dense == 0).sum()),
    )


def _check_record(
    inspected: LinearInspection, expected: LinearResult | None, weight: Tensor, updates: bool
) -> list[str]:
    """Compare a linear with its record; `updates`: kept weights were changed or rounded, perhaps to zero."""
    where = f"layer {inspected.layer} {inspected.name}"
    if expected is None:
        return [f"{where} is not in the record"]
    problems = []
    unexplained = expected.zeros - expected.pruned
    if not updates and inspected.zero_in_dense is not None and unexplained > inspected.zero_in_dense:
        problems.append(f"{where} has {unexplained} zeros that neither its mask nor the dense model has")
    if inspected.shape != expected.shape:
        problems.append(f"{where} has shape {inspected.shape}, the record says {expected.shape}")
    elif inspected.zeros != expected.zeros:
        problems.append(f"{where} has {inspected.zeros} zeros, the record says {expected.zeros}")
    if expected.pattern is not None and not holds(parse_pattern(expected.pattern), weight != 0):
        problems.append(f"{where} does not hold {expected.pattern}, as the record says")
    return problems


def _compare_names(names: Set[str], dense: Set[str], known: Set[str]) -> list[str]:
    """Name tensors that only one model has; `known`: the checkpoint's that the dense model has."""
    problems = []
    for name in sorted(names | dense):
        if name not in names:
            problems.append(f"{name} is in the dense model only")
        elif name not in known:
            problems.append(f"{name} is not in the dense model")
    return problems


def _compare_bits(name: str, tensor: Tensor, dense: Tensor, may_be_zero: bool) -> tuple[list[str], int]:
    """Compare a tensor with the dense one bit for bit; with `may_be_zero`, +0.0 is right, too.

    Returns:
        Problems, and the number of elements that differ.
    """
    if tensor.shape != dense.shape or tensor.dtype != dense.dtype:
        return [
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, in the dense model {tuple(dense.shape)} {dense.dtype}"
        ], 0
    bits, dense_bits = (values.contiguous().view(INTEGERS[values.element_size()]) for values in (tensor, dense))
    differs = bits != dense_bits
    if may_be_zero:
        differs &= bits != 0
        negative_zero = int((differs & (tensor == 0)).sum())
        if negative_zero:
            return [f"{name} has {negative_zero} pruned weights that are -0.0, not +0.0"], 0
    return [], int(differs.sum())
