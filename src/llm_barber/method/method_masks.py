"""Initial masks of a decoder layer by a pruning method, from one pass of its dense weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from llm_barber.errors import overflowed
from llm_barber.loading.job import Job
from llm_barber.masking import saliency
from llm_barber.masking.admm import admm, scaled_gram
from llm_barber.masking.dsnot import dsnot
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.sparsegpt import inverse_factor, sparsegpt
from llm_barber.masking.statistics import GramMatrix, InputMoments, InputSquares
from llm_barber.method.few_tokens import linears_with_few_tokens, total_token_counts
from llm_barber.method.initial_masks import prunes_layers
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.architecture import MLP
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.settings.initial import Initial
from llm_barber.settings.targets import Targets

SCORES = {Initial.WANDA: saliency.wanda, Initial.RIA: saliency.relative_importance}  # from weights and InputSquares


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
                weights[_group_pattern(target)] += math.prod(shapes[f"{self.job.linear_name(index, name)}.weight"])
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
        """None: the masks depend on the dense model alone."""

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

    @property
    def runs_layers(self) -> bool:
        """True if layers are run for statistics of their inputs."""
        return self.method is not Initial.MAGNITUDE

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
                keep = self._mask(saliency.magnitude(dense[name]), targets[name])
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
        match self.method:
            case Initial.MAGNITUDE:
                keeps = {name: self._mask(saliency.magnitude(weight), targets[name]) for name, weight in dense.items()}
            case Initial.WANDA | Initial.RIA:
                score = SCORES[self.method]
                squares = collect_inputs(layer, streams, InputSquares, output)
                keeps = {
                    name: self._mask(score(weight, squares[name].mean), targets[name]) for name, weight in dense.items()
                }
            case Initial.DSNOT:
                moments = collect_inputs(layer, streams, InputMoments, output)
                mlp = [name for block in self.job.blocks(index) if block.name == MLP for name in block.linears]
                keeps = {
                    name: self._dsnot(weight, moments[name], targets[name], left_alone=name in mlp)
                    for name, weight in dense.items()
                }
            case Initial.SPARSEGPT | Initial.ALPS:
                return self._with_updates(index, layer, dense, streams, targets, output)
        return {
            name: PrunedLinear(keep, apply_mask(dense[name], keep), dense[name], _group_pattern(targets[name]))
            for name, keep in keeps.items()
        }

    def _mask(self, scores: Tensor, target: Pattern) -> Tensor:
        return initial_mask(scores, target, self.granularity)

    def _dsnot(self, weight: Tensor, moments: InputMoments, target: Pattern, left_alone: bool) -> Tensor:
        """Wanda's mask, fine-tuned by DSnoT; the released program leaves MLPs' masks alone by default."""
        score = saliency.wanda(weight, moments.squares.mean)
        mask = self._mask(score, target)
        if left_alone:
            return mask
        return dsnot(mask, weight, score, moments.mean, moments.variance, _group_pattern(target))

    def _with_updates(
        self,
        index: int,
        layer: DecoderLayer,
        dense: Mapping[str, Tensor],
        streams: ActivationStreams,
        targets: Mapping[str, Pattern],
        output: str | None,
    ) -> dict[str, PrunedLinear]:
        """Masks of methods that update the weights that they keep."""
        grams = collect_inputs(layer, streams, GramMatrix, output)
        result = {}
        latest: GramMatrix | None = None
        for name, weight in dense.items():
            if grams[name] is not latest:  # q, k and v share a matrix, gate and up another
                latest = grams[name]
                gram = latest.mean
                if not gram.diagonal().isfinite().all():
                    raise overflowed(f"the input of layer {index} {name}")
                if self.method is Initial.ALPS:
                    scaled = scaled_gram(gram)
                else:
                    factor = inverse_factor(gram)
            if self.method is Initial.ALPS:
                keep, updated = admm(weight, gram, targets[name], self.granularity, scaled=scaled)
            else:
                keep, updated = sparsegpt(weight, gram, targets[name], factor=factor)
            updated = updated.to(weight.dtype)
            values = torch.where(keep, updated, weight) if self.keep_updates else weight
            result[name] = PrunedLinear(keep, apply_mask(updated, keep), values, _group_pattern(targets[name]))
        return result


def _group_pattern(target: Pattern) -> NofM | None:
    """N:M that the rebuild keeps up; None: unstructured."""
    return target if isinstance(target, NofM) else None
