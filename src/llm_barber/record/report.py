"""The record of a run: its settings, and the results of all layers, as JSON."""

import json
from collections.abc import Iterable
from enum import StrEnum
from statistics import fmean
from typing import Any, Self

from pydantic import Field, model_validator

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.digests import with_digest
from llm_barber.record.finetuning import FineTuning
from llm_barber.record.layers import ErrorChange, LayerResult, LinearResult, LinearTotals, Result
from llm_barber.record.rounding import Rounding

RECORD_VERSION = 2
# Types of the settings that a page shows, where they are set.
SHOWN = {"include": list, "exclude": list, "skip_layers": list, "blocks": list, "sparsities": dict, "format": str}


class KeptWeights(StrEnum):
    """Source of the kept weights' values."""

    DENSE = "dense"
    UPDATED = "updated"
    LEAST_SQUARES = "least-squares"
    TUNED = "tune"
    FINE_TUNED = "fine-tuned"

    @property
    def words(self) -> str:
        """The source in words, for a sentence."""
        return {
            KeptWeights.DENSE: "the dense model's, bit for bit",
            KeptWeights.UPDATED: "those that the method updated",
            KeptWeights.LEAST_SQUARES: "new ones, from least squares on the calibration text",
            KeptWeights.TUNED: "new ones, from tuning of each layer on the calibration text",
            KeptWeights.FINE_TUNED: "new ones, from fine-tuning after the run",
        }[self]


class CalibrationResult(Result):
    """The calibration windows and their source.

    `first_token`: the token that all windows begin with. `sha256`: of all token ids.
    """

    source: str
    sequences: int
    tokens: int
    first_token: int | None = None
    sha256: str


class SourceFiles(Result):
    """The files of a model that a run read.

    `key`: sha256 that tells their content (`checkpoint/digests.py`). `written`: modification times, ns, of the dense
    model's configuration and shards.
    """

    key: str
    written: dict[str, int] = Field(default_factory=dict)


class RunReport(Result):
    """The record of a finished run: the content of `OUT/barber.json`.

    `settings`: as the user gave them. `resolved`: values of the settings that the preset, the method or the device
    decided. `initial`: method of the initial mask; `method` and `refinement` are in words. `held_out`: number of
    calibration windows that decided which refinements are kept. `seconds`: wall-clock seconds by stage. `peak_memory`,
    `peak_device_memory`: bytes. `loaded_by`: the class of transformers. `files`: sha256 of every file on which a loaded
    model depends, unpacked. `source`: files of the dense model; `pruned_source`: of the pruned model of a rebuild.
    `rounding`: of the kept weights, by `pack --values int8`. `fine_tuning`: of the run's output, by `save_finetuned`.
    """

    record_version: int = RECORD_VERSION
    command: str
    model: str
    output: str
    settings: dict[str, Any]
    resolved: dict[str, Any] = Field(default_factory=dict)
    initial: str
    method: str
    pattern: str
    granularity: str | None
    rebuild_ratio: float | None
    refinement: str | None = None
    held_out: int = 0
    allocation: str = "uniform"
    kept_weights: KeptWeights = KeptWeights.DENSE
    loaded_by: str = "AutoModelForCausalLM"
    calibration: CalibrationResult
    device: str
    dtype: str
    versions: dict[str, str]
    processes: int = 1
    layers: tuple[LayerResult, ...] = Field(min_length=1)
    seconds: dict[str, float]
    peak_memory: int
    peak_device_memory: int | None = None
    files: dict[str, str]
    source: SourceFiles | None = None
    pruned_source: SourceFiles | None = None
    rounding: Rounding | None = None
    fine_tuning: FineTuning | None = None
    later_fields = ("rounding", "fine_tuning")

    @model_validator(mode="after")
    def _can_be_shown(self) -> Self:
        for name, kind in SHOWN.items():
            if self.settings.get(name) is not None and not isinstance(self.settings[name], kind):
                raise ValueError(f"settings: {name} is not of type {kind.__name__}")
        if self.granularity is not None and self.rebuild_ratio is None:
            raise ValueError("a granularity without a rebuild ratio")
        if "total" not in self.seconds or "llm-barber" not in self.versions:
            raise ValueError("seconds lack the total, or versions lack llm-barber")
        return self

    @property
    def pruned(self) -> int:
        """Weights removed, over all linears."""
        return sum(linear.pruned for linear in self.linears)

    @property
    def weights(self) -> int:
        """Weights of all prunable linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """The fraction removed of all prunable linears."""
        return self.pruned / self.weights

    @property
    def changes(self) -> str:
        """The changes to the initial mask and the weights, in words."""
        choices = [
            f"{name.replace('_', ' ')} {', '.join(map(str, self.settings[name]))}"
            for name in ("include", "exclude", "skip_layers")
            if self.settings.get(name)
        ]
        sparsities = self.settings.get("sparsities") or {}
        if sparsities:
            choices.append("sparsities " + ", ".join(f"{name} {value}" for name, value in sparsities.items()))
        if self.settings.get("allow_dense_tail"):
            choices.append("inputs after the last whole group of M dense")
        if self.prunes_head:
            choices.append("with the output head")
        spread = f"sparsity spread by {self.allocation}" if self.allocation != "uniform" else None
        rebuilt = f"rebuilt within each {self.granularity}, ratio {self.rebuild_ratio:g}" if self.granularity else None
        updated = "kept weights updated by the method" if self.kept_weights is KeptWeights.UPDATED else None
        ordered = "channels reordered" if self.reordered else None
        done = filter(None, [ordered, spread, rebuilt, self.refinement, updated])
        preset = [f"preset {self.resolved['preset']}"] if self.resolved.get("preset") else []
        return "; ".join([*preset, *choices, *(list(done) or ["not rebuilt"])])

    @property
    def kept_values(self) -> str:
        """The source of the kept weights' values, and their rounding, in words."""
        words = self.kept_weights.words
        if self.kept_weights is KeptWeights.DENSE and self.reordered:
            words = f"the dense model's in the recorded order ({ORDER_NAME}), bit for bit"
        return words if self.rounding is None else self.rounding.of_values(words)

    @property
    def linears_are_dense(self) -> bool:
        """True if kept weights are the dense model's, bit for bit, but for those that were fine-tuned."""
        unrounded = self.rounding is None
        if self.fine_tuning is not None:
            return unrounded and self.fine_tuning.others_are_dense
        return unrounded and self.kept_weights is KeptWeights.DENSE

    @property
    def training(self) -> str:
        """The training of the model, for a sentence that says how it was pruned."""
        return "without training" if self.fine_tuning is None else "and fine-tuned afterwards"

    @property
    def prunes_head(self) -> bool:
        """True if the output head is pruned; its result is that of a layer after the last."""
        return bool(self.settings.get("prune_head"))

    @property
    def reordered(self) -> bool:
        """True if the channels inside blocks are in another order than in the dense model."""
        return ORDER_NAME in self.files

    @property
    def rejected(self) -> int:
        """Number of blocks that refining would have made worse on held-out windows."""
        return sum(block.rejected for layer in self.layers for block in layer.blocks)

    @property
    def swapped(self) -> int:
        """Number of pruned weights that came back, each in exchange for a kept weight."""
        return sum(linear.grown for linear in self.linears)

    @property
    def linears(self) -> Iterable[LinearResult]:
        """All linears of all layers."""
        return (linear for layer in self.layers for linear in layer.linears)

    @property
    def tuning(self) -> str | None:
        """Results on held-out windows, of tuning and of rejected blocks, in words; None: there are none."""
        layers = [layer for layer in self.layers if layer.held_out]
        parts = []
        if layers:
            distances = [(layer.held_out[0], layer.held_out[layer.kept_pass or 0]) for layer in layers]
            shares = [1 - after / before if before else 0.0 for before, after in distances]
            tuned = sum(bool(layer.kept_pass) for layer in layers)
            parts.append(
                f"distance from the target −{fmean(shares):.0%} in the mean, "
                f"{tuned} of {len(layers)} layers are kept as tuned"
            )
        if self.rejected:
            parts.append(f"blocks left as they were: {self.rejected}")
        return f"on held-out windows: {'; '.join(parts)}" if parts else None

    def error_changes(self) -> dict[str, ErrorChange]:
        """Change of the reconstruction error for each kind of block, over the layers where it was measured."""
        errors: dict[str, list[tuple[float, float]]] = {}
        for layer in self.layers:
            for block in layer.blocks:
                if block.error_before is not None and block.error_after is not None:
                    errors.setdefault(block.name, []).append((block.error_before, block.error_after))
        return {
            name: ErrorChange(
                layers=len(pairs),
                before=fmean(before for before, _ in pairs),
                after=fmean(after for _, after in pairs),
                fell=sum(after < before for before, after in pairs),
                rose=sum(after > before for before, after in pairs),
            )
            for name, pairs in errors.items()
        }

    def by_linear(self) -> list[LinearTotals]:
        """Totals of each linear, experts' together, in the order of a decoder layer."""
        groups: dict[str, list[LinearResult]] = {}
        for linear in self.linears:
            groups.setdefault(linear.kind, []).append(linear)
        return [
            LinearTotals(
                name=name,
                weights=sum(linear.weights for linear in group),
                pruned=sum(linear.pruned for linear in group),
                beneficial_pairs=sum(linear.beneficial_pairs for linear in group),
                grown=sum(linear.grown for linear in group),
                dropped=sum(linear.dropped for linear in group),
            )
            for name, group in groups.items()
        ]

    def to_json(self) -> str:
        """The record as JSON, with its digest, and with sparsities for readers that do not compute them."""
        record = self.model_dump(mode="json")
        record["sparsity"] = self.sparsity
        for layer, result in zip(record["layers"], self.layers, strict=True):
            for block, block_result in zip(layer["blocks"], result.blocks, strict=True):
                for linear, linear_result in zip(block["linears"], block_result.linears, strict=True):
                    linear["sparsity"] = linear_result.sparsity
                    linear["swaps"] = linear_result.grown
        return json.dumps(with_digest(record), indent=1) + "\n"
