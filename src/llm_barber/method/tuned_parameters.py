"""What Adam tunes in a decoder layer: scores that define its masks, changes of its kept weights, or both."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llm_barber.masking.by_rows import multiply
from llm_barber.masking.saliency import wanda
from llm_barber.masking.scores import Scored, count_pruned, masks_from_scores, starting_scores
from llm_barber.masking.selection import equal_runs
from llm_barber.masking.statistics import InputSquares
from llm_barber.method.changes import Changes
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.settings.refining import RefineSettings

WEIGHT_RATE = 0.01  # Adam's rate for kept weights, in units of `step_sizes`
# Adam's rates for scores, whose mean in a row is 1. Fewer scores lie near the border of a group of M than near that of
# a row. So scores of N:M move faster, unless weights are tuned too, which doubles the passes.
SCORE_RATE, PATTERN_SCORE_RATE = 0.02, 0.04

Linears = Mapping[str, PrunedLinear]


class TunedParameters:
    """Adam's parameters for a layer's linears; tensors are (out, in), by linear.

    Experts with few tokens stay as they are: their linears have no parameters.

    Attributes:
        frozen_weights: weights of these experts, in the compute dtype.
    """

    def __init__(self, layer: DecoderLayer, pruned: Linears, settings: RefineSettings, streams: ActivationStreams):
        linears, squares = _collect_squares(layer, pruned, streams)
        self._frozen = {name: linear for name, linear in linears.items() if linear.few_tokens}
        self.frozen_weights = {name: linear.weight.to(layer.dtype) for name, linear in self._frozen.items()}
        self._tuned = {name: linear for name, linear in linears.items() if not linear.few_tokens}
        self._scores: dict[str, Tensor] = {}
        self._pruned_counts: dict[str, Tensor] = {}
        self._changes: dict[str, Changes] = {}
        self._dtype = layer.dtype
        for name, linear in self._tuned.items():
            mean = squares[name].mean
            if settings.tunes_masks:
                self._pruned_counts[name] = count_pruned(linear.keep, linear.pattern)
                scores = starting_scores(linear.keep, wanda(linear.values, mean), linear.pattern, linear.fixed)
                self._scores[name] = scores.requires_grad_()
            if settings.tunes_weights:
                rows, columns = step_sizes(linear.values, mean)
                self._changes[name] = Changes(linear.values, rows.unsqueeze(0), columns.unsqueeze(0))
        self._runs = {
            name: equal_runs(counts[:, 0])
            for name, counts in self._pruned_counts.items()
            if self._tuned[name].pattern is None
        }

    def groups(self) -> list[dict[str, object]]:
        """Groups of parameters with their rates, as Adam takes them."""
        groups: list[dict[str, object]] = []
        for name, scores in self._scores.items():
            faster = self._tuned[name].pattern is not None and not self._changes
            groups.append({"params": [scores], "lr": PATTERN_SCORE_RATE if faster else SCORE_RATE})
        if self._changes:
            groups.append({"params": [changes.parameter for changes in self._changes.values()], "lr": WEIGHT_RATE})
        return groups

    def tuned_weights(self) -> dict[str, Tensor]:
        """Current weights that are tuned, in the compute dtype and in tensors that are not the parameters."""
        if not self._changes:
            return {name: linear.weight.to(self._dtype) for name, linear in self._tuned.items()}
        return {
            name: self._changes[name].values(linear.values, self._dtype, linear.keep)
            for name, linear in self._tuned.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Current weights of the layer, those of experts with few tokens among them."""
        return self.frozen_weights | self.tuned_weights()

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the parameters' gradients, float32, from gradients by the tuned weights, in `SUM_DTYPES`.

        The gradients by the weights are used up.
        """
        for name, linear in self._tuned.items():
            gradient, changes = gradients[name].float(), self._changes.get(name)
            if changes is not None:
                changes.set_gradient(gradient, linear.free)
            if name in self._scores:
                multiply_by_values = multiply if changes is None else changes.multiply
                self._scores[name].grad = multiply_by_values(gradient, linear.values)

    def update_masks(self) -> None:
        """Make the masks from the scores, after a step of Adam."""
        scored = []
        for name, scores in self._scores.items():
            linear = self._tuned[name]
            counts = self._pruned_counts[name]
            scored.append(Scored(scores.detach(), linear.keep, counts, linear.pattern, self._runs.get(name)))
        for name, keep in zip(self._scores, masks_from_scores(scored), strict=True):
            linear = self._tuned[name]
            # If values change, `tuned_weights` and `linears` compute the weight from them.
            self._tuned[name] = replace(linear, keep=keep) if self._changes else linear.with_mask(keep)

    def linears(self) -> dict[str, PrunedLinear]:
        """Current linears: masks, values and weights."""
        if not self._changes:
            return self._frozen | self._tuned
        tuned = {}
        for name, linear in self._tuned.items():
            values = self._changes[name].values(linear.values, linear.values.dtype)
            tuned[name] = replace(linear, values=values).with_mask(linear.keep)
        return self._frozen | tuned


def _collect_squares(
    layer: DecoderLayer, pruned: Linears, streams: ActivationStreams
) -> tuple[dict[str, PrunedLinear], dict[str, InputSquares]]:
    """Linears, of which those with few tokens are frozen, and the input squares of each in the pruned layer."""
    layer.set_weights({name: linear.weight for name, linear in pruned.items()})
    layer.forget_tokens()
    squares = collect_inputs(layer, streams, InputSquares)
    return freeze_linears_with_few_tokens(pruned, layer, streams.ranks), squares


def step_sizes(weight: Tensor, input_squares: Tensor) -> tuple[Tensor, Tensor]:
    """Size of each weight's step at rate 1, which changes |W| · ‖X‖ by its mean in the row.

    If all weights of a linear had the same step size, a step would mostly change what the columns of huge inputs add to
    the output (some inputs are a hundred times the median). An input smaller than the median of the nonzero inputs
    counts as that median, since it may be larger in other text.

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.

    Returns:
        Two factors of the size, by row and by column: float32, (out, 1) and (in,).
    """
    sizes = input_squares.sqrt()
    nonzero = sizes[sizes > 0]
    bounded = sizes.clamp_min(nonzero.median()) if len(nonzero) else torch.ones_like(sizes)
    return wanda(weight, input_squares).mean(1, keepdim=True), 1 / bounded
