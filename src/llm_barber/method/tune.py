"""Tune the masks of a decoder layer, its kept weights, or both, by a short run of Adam.

The loss is the mean squared distance (`distance.py`) between the pruned layer's output, on the inputs that the pruned
model gives it, and its target (`target_output.py`). Masks follow from scores (`masking/scores.py`), which start as
Wanda's. Held-out windows choose the pass whose result is kept, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.masking.by_rows import add_scaled, multiply, set_scaled
from llm_barber.masking.saliency import wanda
from llm_barber.masking.scores import Scored, count_pruned, masks_from_scores, starting_scores
from llm_barber.masking.selection import apply_mask, equal_runs
from llm_barber.masking.statistics import InputSquares
from llm_barber.method.distance import Distance
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.held_out import Judgement, judge
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import check_finite, scaled_by_sequence
from llm_barber.model.streams import HIDDEN, TARGET, ActivationStreams
from llm_barber.record.layers import Concentration, kept_pass
from llm_barber.settings.refining import RefineSettings

WEIGHT_RATE = 0.01  # Adam's rate for kept weights, in units of `step_sizes`
# Adam's rates for scores, whose mean in a row is 1. Fewer scores lie near the border of a group of M than near that of
# a row. So scores of N:M move faster, unless weights are tuned too, which doubles the passes.
SCORE_RATE, PATTERN_SCORE_RATE = 0.02, 0.04
MOMENTUM = (0.9, 0.95)
EPSILON = 1e-12  # Adam's; so small that the scale of a model's states does not matter
# Gradients are summed in more bits, so that their order, and the number of processes, hardly ever show in the sum.
SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

Linears = Mapping[str, PrunedLinear]


@dataclass(frozen=True)
class Tuned:
    """A tuned layer: its linears, and the distance of its output from the target on the held-out windows.

    `held_out`: mean distance before tuning and after each pass (`kept_pass` says which pass is kept). `concentration`:
    shares of the largest token and channel in the distance. Without held-out windows they are empty and None.
    """

    linears: dict[str, PrunedLinear]
    held_out: tuple[float, ...]
    concentration: Concentration | None = None

    @property
    def rejected(self) -> bool:
        """True if no pass came nearer to the target on the held-out windows."""
        return kept_pass(self.held_out) == 0


def tune_layer(
    layer: DecoderLayer,
    pruned: Linears,
    distance: Distance,
    settings: RefineSettings,
    streams: ActivationStreams,
    label: str,
) -> Tuned:
    """Tune the masks, the kept weights, or both, of a layer's linears, as the settings say.

    Args:
        layer: the decoder layer, with any weights.
        pruned: masks and values to start from, by linear.
        distance: from the targets, that of `target_output.write_targets`.
        settings: number of held-out windows; passes over the other windows.
        streams: the layer's input and its target (`TARGET`).
        label: the layer's name in messages.

    Raises:
        NotFiniteError: a gradient holds NaN or Inf.
    """
    return _descend(_Parameters(layer, pruned, settings, streams), layer, distance, settings, streams, label)


class _Parameters:
    """Adam's parameters for a layer: scores that define its masks, changes of its kept weights, or both.

    Experts with few tokens stay as they are: they have no scores, and none of their weights is free to move.
    """

    def __init__(self, layer: DecoderLayer, pruned: Linears, settings: RefineSettings, streams: ActivationStreams):
        self._linears = dict(pruned)
        self._pruned_counts = {name: count_pruned(linear.keep, linear.pattern) for name, linear in pruned.items()}
        self._runs = {
            name: equal_runs(self._pruned_counts[name][:, 0])
            for name, linear in pruned.items()
            if linear.pattern is None and settings.tunes_masks
        }
        self._scores: dict[str, Tensor] = {}
        self._changes: dict[str, Tensor] = {}  # of the values, in units of `_steps`
        self._steps: dict[str, tuple[Tensor, Tensor]] = {}
        squares = self._collect_squares(layer, streams)
        if settings.tunes_masks:
            for name, linear in self._linears.items():
                if not linear.few_tokens:
                    saliency = wanda(linear.values, squares[name].mean)
                    scores = starting_scores(linear.keep, saliency, linear.pattern, linear.fixed)
                    self._scores[name] = scores.requires_grad_()
        if settings.tunes_weights:
            for name, linear in self._linears.items():
                self._changes[name] = torch.zeros_like(linear.values, dtype=torch.float32, requires_grad=True)
                self._steps[name] = step_sizes(linear.values, squares[name].mean)

    def _collect_squares(self, layer: DecoderLayer, streams: ActivationStreams) -> dict[str, InputSquares]:
        """Collect the input squares of the linears in the pruned layer, and freeze linears with few tokens."""
        layer.set_weights({name: linear.weight for name, linear in self._linears.items()})
        layer.forget_tokens()
        squares = collect_inputs(layer, streams, InputSquares)
        self._linears = freeze_linears_with_few_tokens(self._linears, layer, streams.ranks)
        return squares

    def groups(self) -> list[dict[str, object]]:
        """Groups of parameters with their rates, as Adam takes them."""
        groups: list[dict[str, object]] = []
        for name, scores in self._scores.items():
            faster = self._linears[name].pattern is not None and not self._changes
            groups.append({"params": [scores], "lr": PATTERN_SCORE_RATE if faster else SCORE_RATE})
        if self._changes:
            groups.append({"params": list(self._changes.values()), "lr": WEIGHT_RATE})
        return groups

    def weights(self) -> dict[str, Tensor]:
        """Current weights of the layer, (out, in), by linear, in tensors that are not the parameters."""
        if not self._changes:
            return {name: linear.weight for name, linear in self._linears.items()}
        return {name: apply_mask(self._values(name), linear.keep) for name, linear in self._linears.items()}

    def _values(self, name: str) -> Tensor:
        """Current weights of a linear whose values are tuned, before its mask is applied: float32, (out, in)."""
        row_steps, column_steps = self._steps[name]
        return self._linears[name].values.float().addcmul(self._changes[name].detach() * row_steps, column_steps)

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the parameters' gradients, float32, from gradients by the weights, (out, in), in `SUM_DTYPES`.

        The gradients by the weights are used up.
        """
        for name, changes in self._changes.items():
            row_steps, column_steps = self._steps[name]
            changes.grad = (gradients[name].float() * row_steps).mul_(column_steps).mul_(self._linears[name].free)
        for name, scores in self._scores.items():
            values = self._values(name) if self._changes else self._linears[name].values
            scores.grad = multiply(gradients[name].float(), values)

    def update_masks(self) -> None:
        """Make the masks from the scores, after a step of Adam."""
        scored = []
        for name, scores in self._scores.items():
            linear = self._linears[name]
            counts = self._pruned_counts[name]
            scored.append(Scored(scores.detach(), linear.keep, counts, linear.pattern, self._runs.get(name)))
        for name, keep in zip(self._scores, masks_from_scores(scored), strict=True):
            linear = self._linears[name]
            # If values change, `weights` and `linears` compute the weight from them, and do not read the linear's.
            self._linears[name] = replace(linear, keep=keep) if self._changes else linear.with_mask(keep)

    def linears(self) -> dict[str, PrunedLinear]:
        """Current linears: masks, values and weights."""
        linears = dict(self._linears)
        for name in self._changes:
            linear = linears[name]
            linears[name] = replace(linear, values=self._values(name).to(linear.values.dtype)).with_mask(linear.keep)
        return linears


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


def _descend(
    parameters: _Parameters,
    layer: DecoderLayer,
    distance: Distance,
    settings: RefineSettings,
    streams: ActivationStreams,
    label: str,
) -> Tuned:
    """Run all passes of Adam, and keep the last pass that beats the untuned layer on the held-out windows.

    Without held-out windows the last pass is kept. The pass with the least distance is not the best choice: steps get
    smaller, and an early pass is nearest by chance more often.
    """
    groups = parameters.groups()
    if not groups:
        return Tuned(parameters.linears(), ())
    steps = settings.steps(streams)
    total = settings.passes * len(steps)
    elements = streams.read(TARGET, slice(0, 1)).numel()
    optimizer = torch.optim.Adam(groups, betas=MOMENTUM, eps=EPSILON, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    generator = torch.Generator().manual_seed(0)
    linears = parameters.linears()
    sums = {
        name: torch.empty_like(weight, dtype=SUM_DTYPES[layer.dtype]) for name, weight in parameters.weights().items()
    }
    judgements = [judge(layer, parameters.weights(), distance, streams)] if settings.held_out else []
    for _ in range(settings.passes):
        for step in torch.randperm(len(steps), generator=generator).tolist():
            weights = {
                name: weight.to(layer.dtype).detach().requires_grad_() for name, weight in parameters.weights().items()
            }
            empty = set(sums)
            for sequence in steps[step].local_sequences:
                _add_gradients(sums, empty, layer, weights, streams, slice(sequence, sequence + 1), distance)
            for name in empty:
                sums[name].zero_()
            for gradient in sums.values():
                streams.ranks.add_tensor(gradient)
                gradient *= 2 / (elements * steps[step].sequences)  # from half the sum of squares to their mean
            check_finite(sums, label)
            parameters.set_gradients(sums)
            optimizer.step()
            optimizer.zero_grad()  # the next step's activations need the memory
            schedule.step()
            parameters.update_masks()
        if settings.held_out:
            judgements.append(judge(layer, parameters.weights(), distance, streams))
            if kept_pass(_errors(judgements)) != len(judgements) - 1:
                continue
        linears = parameters.linears()
    return Tuned(linears, _errors(judgements), _concentration(judgements))


def _errors(judgements: list[Judgement]) -> tuple[float, ...]:
    return tuple(judgement.error for judgement in judgements)


def _concentration(judgements: list[Judgement]) -> Concentration | None:
    """Shares of the largest token and channel before and after tuning; None without held-out windows."""
    if not judgements:
        return None
    before, after = judgements[0], judgements[kept_pass(_errors(judgements)) or 0]
    return Concentration(
        token_before=before.token_share,
        token_after=after.token_share,
        channel_before=before.channel_share,
        channel_after=after.channel_share,
    )


def _add_gradients(
    sums: Mapping[str, Tensor],
    empty: set[str],
    layer: DecoderLayer,
    weights: Mapping[str, Tensor],
    streams: ActivationStreams,
    sequence: slice,
    distance: Distance,
) -> None:
    """Add one sequence's gradients by the weights to the sums, (out, in), by linear.

    The loss is half the distance, summed over tokens and channels. Sums named in `empty` begin here, and leave the set.
    """
    hidden, target = streams.read(HIDDEN, sequence), streams.read(TARGET, sequence)

    def compute() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        output = layer.output_with(weights, hidden)
        scaled, scale = scaled_by_sequence(distance.gradient(target, output.detach()), output.dtype)
        return scale, torch.autograd.grad(output, list(weights.values()), scaled, allow_unused=True)

    scale, gradients = layer.compute_gradients(compute)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:  # the sequence may have no token for an expert
            (set_scaled if name in empty else add_scaled)(sums[name], gradient, scale)
            empty.discard(name)
