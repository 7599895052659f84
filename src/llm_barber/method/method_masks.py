"""Initial masks of a decoder layer by a pruning method, from one pass of its dense weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llm_barber.loading.job import Job
from llm_barber.masking import saliency
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, group_pattern
from llm_barber.masking.selection import apply_mask
from llm_barber.method.few_tokens import linears_with_few_tokens, total_token_counts
from llm_barber.method.initial_masks import prunes_layers
from llm_barber.method.initial_methods import MASK_METHODS, PrunableLinear, prune_linear
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.architecture import MLP
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.settings.presets import Initial
from llm_barber.settings.targets import Targets


class MethodMasks:
    """Initial masks by a method, all linears of a decoder layer from one pass of its dense weights.

    Args:
        job: the opened model.
        method: of pruning.
        targets: the sparsity or N:M of each linear.
        granularity: comparison group; None: the method's released program's.
        keep_updates: weights that the method updates are written; otherwise the dense ones are.
    """

    def __init__(
        self, job: Job, method: Initial, targets: Targets, granularity: Granularity | None, keep_updates: bool
    ) -> None:
        self.job = job
        self.method = method
        self.targets = targets
        self.granularity = granularity or (Granularity.LINEAR if method.compares_in_linear else Granularity.OUTPUT)
        self.keep_updates = keep_updates

    @property
    def target(self) -> Pattern:
        """Sparsity or N:M of linears without a target of their own."""
        return self.targets.pattern

    @property
    def target_words(self) -> str:
        """The target, for people."""
        pattern = self.targets.pattern
        words = str(pattern) if isinstance(pattern, NofM) else f"{pattern.sparsity:g} unstructured"
        return f"{words}, some linears their own" if self.targets.exceptions else words

    @property
    def has_one_target(self) -> bool:
        """True if no linear has a target of its own."""
        return not self.targets.exceptions

    @cached_property
    def pattern(self) -> NofM | None:
        """N:M of most of the decoder layers' pruned weights; None: most are unstructured."""
        shapes = self.job.linear_shapes(self.job.source)
        weights: Counter[NofM | None] = Counter()
        for index in range(self.job.layer_count):
            for name, target in self.targets_of(index).items():
                weights[group_pattern(target)] += math.prod(shapes[f"{self.job.linear_name(index, name)}.weight"])
        return max(weights, key=weights.__getitem__, default=None)

    @cached_property
    def budget(self) -> float | None:
        """Sparsity that an allocation can spread.

        None: N:M, linears with targets of their own, or no linears to prune.
        """
        pattern = self.targets.pattern
        if isinstance(pattern, NofM) or self.targets.exceptions or not prunes_layers(self):
            return None
        return pattern.sparsity

    @property
    def source_files(self) -> None:
        """Files of a pruned model; None: the masks depend on the dense model alone."""

    def set_sparsities(self, sparsities: Mapping[str, float]) -> None:
        """Prune linears, by their names in the model, to these sparsities."""
        self.targets = replace(self.targets, allocated=dict(sparsities))

    def targets_of(self, index: int) -> dict[str, Pattern]:
        """Targets of a layer's linears, by linear; linears that are not pruned are left out."""
        targets = {
            name: self.targets.of(index, self.job.linear_name(index, name), self.job.layer_count)
            for name in self.job.linears(index)
        }
        return {name: target for name, target in targets.items() if target is not None}

    def linears(self, index: int) -> tuple[str, ...]:
        """The linears of a layer that are pruned."""
        return tuple(self.targets_of(index))

    def patterns(self, index: int) -> dict[str, NofM]:
        """N:M of the linears of a layer that are pruned to one, by linear."""
        return {name: target for name, target in self.targets_of(index).items() if isinstance(target, NofM)}

    @property
    def runs_layers(self) -> bool:
        """True if layers are run for statistics of their inputs."""
        return self.method.reads_inputs

    def __call__(
        self,
        index: int,
        layer: DecoderLayer,
        dense: Mapping[str, Tensor],
        streams: ActivationStreams,
        output: str | None = None,
    ) -> dict[str, PrunedLinear]:
        """One `PrunedLinear` for each linear in `dense` that has a target."""
        targets = self.targets_of(index)
        if not targets:
            return {}
        layer.select(targets)
        dense = {name: dense[name] for name in targets}
        layer.forget_tokens()
        linears = self._by_method(index, layer, dense, streams, targets, output)
        if self.runs_layers:
            linears = {name: replace(linear, few_tokens=False) for name, linear in linears.items()}
            for name in linears_with_few_tokens(layer, total_token_counts(layer, streams.ranks)):
                keep = initial_mask(saliency.magnitude(dense[name]), targets[name], self.granularity)
                linears[name] = replace(linears[name], values=dense[name]).with_mask(keep).left_alone()
        return linears

    def _by_method(
        self,
        index: int,
        layer: DecoderLayer,
        dense: Mapping[str, Tensor],
        streams: ActivationStreams,
        targets: Mapping[str, Pattern],
        output: str | None,
    ) -> dict[str, PrunedLinear]:
        """Masks of all linears, those of experts with few tokens among them."""
        method = MASK_METHODS[self.method]
        statistics: Mapping[str, Any] = {}
        if method.statistic is not None:
            statistics = collect_inputs(layer, streams, method.statistic, output)
        in_mlp = {name for block in self.job.blocks(index) if block.name == MLP for name in block.linears}
        pruned = {}
        latest: Any = None
        prepared: Any = None
        for name, weight in dense.items():
            message_name = f"layer {index} {name}"
            if (statistic := statistics.get(name)) is not latest:
                prepared = None  # frees the matrices of the linears before
                latest, prepared = statistic, method.prepare(statistic, message_name)
            linear = PrunableLinear(message_name, weight, targets[name], self.granularity, name in in_mlp)
            keep, updated = prune_linear(self.method, linear, prepared)
            values = updated = weight if updated is None else updated.to(weight.dtype)
            if self.method.has_updates:
                values = torch.where(keep, updated, weight) if self.keep_updates else weight
            pruned[name] = PrunedLinear(keep, apply_mask(updated, keep), values, group_pattern(linear.target))
        return pruned
