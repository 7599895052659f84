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
from llm_barber.method.stacks import Stack, stack_linears
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.settings.refining import RefineSettings

WEIGHT_RATE = 0.01  # Adam's rate for kept weights, in units of `step_sizes`
# Adam's rates for scores, whose mean in a row is 1. Fewer scores lie near the border of a group of M than near that of
# a row. So scores of N:M move faster, unless weights are tuned too, which doubles the passes.
SCORE_RATE, PATTERN_SCORE_RATE = 0.02, 0.04

Linears = Mapping[str, PrunedLinear]


class TunedParameters:
    """Adam's parameters for a layer, one for each stack of linears (`stacks.py`); tensors are by the stack's name.

    Experts with few tokens stay as they are: they are in no stack.
    """

    def __init__(self, layer: DecoderLayer, pruned: Linears, settings: RefineSettings, streams: ActivationStreams):
        linears, squares = _collect_squares(layer, pruned, streams)
        tuned = {name: linear for name, linear in linears.items() if not linear.few_tokens}
        stacks = stack_linears(tuned, layer.experts)
        self._frozen = {name: linear for name, linear in linears.items() if linear.few_tokens}
        self._frozen_weights = {name: linear.weight.to(layer.dtype) for name, linear in self._frozen.items()}
        self._stacks = {stack.name: stack for stack in stacks}
        self._scores: dict[str, Tensor] = {}
        self._pruned_counts: dict[str, Tensor] = {}
        self._changes: dict[str, Changes] = {}
        self._dtype = layer.dtype
        for stack in stacks:
            values = stack.split(stack.linear.values)
            if settings.tunes_masks:
                saliency = [wanda(of_linear, squares[name].mean) for name, of_linear in values.items()]
                self._add_scores(stack, torch.cat(saliency) if len(saliency) > 1 else saliency[0])
            if settings.tunes_weights:
                sizes = [step_sizes(of_linear, squares[name].mean) for name, of_linear in values.items()]
                rows, columns = (torch.stack(factors) for factors in zip(*sizes, strict=True))
                self._changes[stack.name] = Changes(stack.linear.values, rows, columns)
        self._runs = {
            name: equal_runs(counts[:, 0])
            for name, counts in self._pruned_counts.items()
            if self._stacks[name].linear.pattern is None
        }

    def _add_scores(self, stack: Stack, saliency: Tensor) -> None:
        linear = stack.linear
        self._pruned_counts[stack.name] = count_pruned(linear.keep, linear.pattern)
        scores = starting_scores(linear.keep, saliency, linear.pattern, linear.fixed)
        self._scores[stack.name] = scores.requires_grad_()

    def groups(self) -> list[dict[str, object]]:
        """Groups of parameters with their rates, as Adam takes them."""
        groups: list[dict[str, object]] = []
        for name, scores in self._scores.items():
            faster = self._stacks[name].linear.pattern is not None and not self._changes
            groups.append({"params": [scores], "lr": PATTERN_SCORE_RATE if faster else SCORE_RATE})
        if self._changes:
            groups.append({"params": [changes.parameter for changes in self._changes.values()], "lr": WEIGHT_RATE})
        return groups

    def stacked_weights(self) -> dict[str, Tensor]:
        """Current weights, (n · out, in), in the compute dtype and in tensors that are not the parameters."""
        linears = {name: stack.linear for name, stack in self._stacks.items()}
        if not self._changes:
            return {name: linear.weight.to(self._dtype) for name, linear in linears.items()}
        return {
            name: self._changes[name].values(linear.values, self._dtype, linear.keep)
            for name, linear in linears.items()
        }

    def stacked(self, by_linear: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stack tensors (out, in) of linears, (n · out, in); stacks none of whose linears is named are left out.

        Those of experts with few tokens are ignored.
        """
        return {
            name: stack.join(by_linear)
            for name, stack in self._stacks.items()
            if any(linear_name in by_linear for linear_name in stack.names)
        }

    def by_linear(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of all linears, (out, in): views of the stacks', and those of experts with few tokens."""
        weights = dict(self._frozen_weights)
        for name, tensor in stacked.items():
            weights |= self._stacks[name].split(tensor)
        return weights

    def weights(self) -> dict[str, Tensor]:
        """Current weights of the layer, (out, in), by linear."""
        return self.by_linear(self.stacked_weights())

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the parameters' gradients, float32, from gradients by the weights, (n · out, in), in `SUM_DTYPES`.

        The gradients by the weights are used up.
        """
        for name, stack in self._stacks.items():
            gradient, linear, changes = gradients[name].float(), stack.linear, self._changes.get(name)
            if changes is not None:
                changes.set_gradient(gradient, linear.free)
            if name in self._scores:
                multiply_by_values = multiply if changes is None else changes.multiply
                self._scores[name].grad = multiply_by_values(gradient, linear.values)

    def update_masks(self) -> None:
        """Make the masks from the scores, after a step of Adam."""
        scored = []
        for name, scores in self._scores.items():
            linear = self._stacks[name].linear
            counts = self._pruned_counts[name]
            scored.append(Scored(scores.detach(), linear.keep, counts, linear.pattern, self._runs.get(name)))
        for name, keep in zip(self._scores, masks_from_scores(scored), strict=True):
            stack = self._stacks[name]
            # If values change, `stacked_weights` and `linears` compute the weight from them.
            linear = replace(stack.linear, keep=keep) if self._changes else stack.linear.with_mask(keep)
            self._stacks[name] = replace(stack, linear=linear)

    def linears(self) -> dict[str, PrunedLinear]:
        """Current linears: masks, values and weights."""
        linears = dict(self._frozen)
        for name, stack in self._stacks.items():
            linear = stack.linear
            if self._changes:
                values = self._changes[name].values(linear.values, linear.values.dtype)
                linear = replace(linear, values=values).with_mask(linear.keep)
            linears |= replace(stack, linear=linear).linears()
        return linears


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
