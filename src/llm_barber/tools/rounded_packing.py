"""Pack a pruned checkpoint with its kept weights rounded to int8: another model, and its record says so."""

from collections.abc import Mapping

from torch import Tensor

from llm_barber.checkpoint.packed import Packing, can_be_rounded
from llm_barber.checkpoint.packed_format import RoundedEntry
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.progress import Progress
from llm_barber.record.file import recorded_structure
from llm_barber.record.layers import LayerResult, LinearResult
from llm_barber.record.report import RunReport
from llm_barber.record.rounding import Rounding
from llm_barber.tools.linears import FoundLinear, find_linears


def refuse_unpruned(source: CheckpointSource, record: RunReport | None, progress: Progress) -> None:
    """Refuse to round a checkpoint without a pruned matrix, or one that is rounded already.

    A pruned checkpoint is known by its first linear; a dense one is read whole.

    Raises:
        ModelError: it is not pruned, or its record says that it is rounded.
    """
    if record is not None and record.rounding is not None:
        raise ModelError(
            f"the kept weights of {source.model} are rounded already, and rounding again would add errors",
            "pack it without --values int8, or start from the model that was rounded",
        )
    # Linears are smaller than the embedding, which is rarely pruned.
    matrices = sorted((info.bytes, name) for name, info in source.tensors.items() if len(info.shape) in (2, 3))
    progress.start("looking for pruned weights", len(matrices))
    for _, name in matrices:
        if can_be_rounded(source.read([name])[name]):
            return
        progress.advance(name)
    raise ModelError(
        f"no matrix of {source.model} is pruned, and only kept weights of pruned ones are rounded",
        "prune it first: llm-barber prune; to quantise a dense model take a program for that, such as llama.cpp",
    )


class Rounder:
    """Packs shards with rounded values, and counts the zeros of the rounded model for its record.

    Args:
        source: the checkpoint.
        record: its record; None: it has none, and nothing is counted.
        progress: told of warnings.
    """

    def __init__(self, source: CheckpointSource, record: RunReport | None, progress: Progress) -> None:
        self._linears: Mapping[str, list[FoundLinear]] = {}
        if record is not None:
            self._linears = find_linears(source, recorded_structure(record), record.prunes_head, progress)
        self._zeros: dict[tuple[int, str], int] = {}
        self.packing = Packing(rounds=True, restored=self._count_zeros)

    @property
    def rounding(self) -> Rounding:
        """The rounding of the shards so far."""
        entries = {name: entry for name, entry in self.packing.entries.items() if isinstance(entry, RoundedEntry)}
        group = max(entry.group for entry in entries.values())
        return Rounding(group=group, errors={name: entry.error for name, entry in entries.items()})

    def _count_zeros(self, name: str, tensor: Tensor) -> None:
        for linear in self._linears.get(name, []):
            if not linear.alias:
                self._zeros[linear.layer, linear.name] = int((linear.weight(tensor) == 0).sum())

    def amended(self, record: RunReport) -> RunReport:
        """The record of the rounded model: its zeros, and the rounding."""
        layers = tuple(with_zeros(layer, self._zeros) for layer in record.layers)
        return record.model_copy(update={"layers": layers, "rounding": self.rounding})


def with_zeros(layer: LayerResult, zeros: Mapping[tuple[int, str], int]) -> LayerResult:
    """The result of a layer with other counts of zeros, by layer and linear; linears without a count keep theirs."""

    def counted(linear: LinearResult) -> LinearResult:
        return linear.model_copy(update={"zeros": zeros.get((layer.index, linear.name), linear.zeros)})

    blocks = (
        block.model_copy(update={"linears": tuple(counted(linear) for linear in block.linears)})
        for block in layer.blocks
    )
    return layer.model_copy(update={"blocks": tuple(blocks)})
