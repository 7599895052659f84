"""Tune a whole decoder layer against its output, by a short run of Adam: its masks, the weights they keep, or both.

The loss is the mean squared distance (`distance.py`) of the layer's output, on the inputs that the pruned model gives
it, from the dense layer's; on these same inputs (`target_mix` 0, as EBFT, 2024), or on those of the dense model (1), or
between. Masks follow from scores (`masking/scores.py`), which start as Wanda's. Held-out windows decide whether
anything of it is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_barber.errors import NotFiniteError
from llm_barber.masking.saliency import wanda
from llm_barber.masking.scores import count_pruned, mask_from_scores, starting_scores
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.statistics import InputSquares
from llm_barber.method.distance import Distance, usual_squares
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.held_out import Judgement, judge
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import scaled_by_sequence
from llm_barber.model.streams import DENSE, HIDDEN, NEXT, TARGET, ActivationStreams
from llm_barber.record.layers import Concentration, kept_pass
from llm_barber.settings.refining import RefineSettings

WEIGHT_RATE = 0.01  # of Adam, in steps (`step_sizes`)
# The mean of a row's scores is 1. More of them lie near the border of a row than near that of a group of M, whose
# scores move faster where they move alone, in half as many passes.
SCORE_RATE, PATTERN_SCORE_RATE = 0.02, 0.04
MOMENTUM = (0.9, 0.95)
SMALLEST = 1e-12  # of a gradient, so that the size of a model's states does not matter
# What gradients of sequences are added up in: so many more bits that the order, and how many processes
# there are, hardly ever shows.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

Linears = Mapping[str, PrunedLinear]


@dataclass(frozen=True)
class Tuned:
    """A layer's linears, and how far its output is from the target on the held-out windows.

    `held_out`: mean distance before tuning and after each pass (`kept_pass` says which one is kept); empty without
    held-out windows. `concentration`: shares of the largest token and channel in the distance; None without them.
    """

    linears: dict[str, PrunedLinear]
    held_out: tuple[float, ...]
    concentration: Concentration | None = None

    @property
    def rejected(self) -> bool:
        """Whether no pass came nearer to the target on the held-out windows."""
        return kept_pass(self.held_out) == 0


def tune_layer(
    layer: DecoderLayer,
    dense: Mapping[str, Tensor],
    pruned: Linears,
    settings: RefineSettings,
    streams: ActivationStreams,
    where: str,
) -> Tuned:
    """The layer's linears with better masks and values, as far as that is asked for.

    Args:
        layer: any weights.
        dense: dense weights, (out, in), by linear.
        pruned: masks and values to start from, by linear.
        settings: target mix; windows held out; passes over the others.
        streams: the layer's input; for a mix, the dense model's output of it (`DENSE + NEXT`), too.
        where: which layer, for a message.

    Raises:
        NotFiniteError: a gradient holds NaN or Inf.
    """
    distance = _write_targets(layer, dense, settings.target_mix, streams)
    return _descend(_Moving(layer, pruned, settings, streams), layer, distance, settings, streams, where)


class _Moving:
    """What Adam moves of a layer: scores that its masks follow from, the weights that they keep, or both.

    Experts with few tokens stay as they are: they have no scores, and none of their weights is free to move.
    """

    def __init__(self, layer: DecoderLayer, pruned: Linears, settings: RefineSettings, streams: ActivationStreams):
        self._now = dict(pruned)
        self._pruned = {name: count_pruned(one.keep, one.pattern) for name, one in pruned.items()}
        self._scores: dict[str, Tensor] = {}
        self._changes: dict[str, Tensor] = {}  # of the values, in steps
        self._steps: dict[str, tuple[Tensor, Tensor]] = {}
        squares = self._look(layer, streams)
        if settings.tunes_masks:
            self._scores = {
                name: starting_scores(
                    one.keep, wanda(one.values, squares[name].mean), one.pattern, one.fixed
                ).requires_grad_()
                for name, one in self._now.items()
                if not one.few_tokens
            }
        if settings.tunes_weights:
            for name, one in self._now.items():
                self._changes[name] = torch.zeros_like(one.values, dtype=torch.float32, requires_grad=True)
                self._steps[name] = step_sizes(one.values, squares[name].mean)

    def _look(self, layer: DecoderLayer, streams: ActivationStreams) -> dict[str, InputSquares]:
        """What the pruned layer gives its linears, and which of them hardly anything."""
        layer.set_weights({name: one.weight for name, one in self._now.items()})
        layer.forget_tokens()
        squares = collect_inputs(layer, streams, InputSquares)
        self._now = freeze_linears_with_few_tokens(self._now, layer, streams.ranks)
        return squares

    def groups(self) -> list[dict[str, object]]:
        """Of parameters, as Adam takes them."""
        found: list[dict[str, object]] = []
        for name, one in self._scores.items():
            faster = self._now[name].pattern is not None and not self._changes
            rate = PATTERN_SCORE_RATE if faster else SCORE_RATE
            found.append({"params": [one], "lr": rate})
        if self._changes:
            found.append({"params": list(self._changes.values()), "lr": WEIGHT_RATE})
        return found

    def weights(self) -> dict[str, Tensor]:
        """The layer's weights as they are now, (out, in), by linear, in tensors that are not the parameters."""
        if not self._changes:
            return {name: one.weight for name, one in self._now.items()}
        return {name: apply_mask(self._values(name), one.keep) for name, one in self._now.items()}

    def _values(self, name: str) -> Tensor:
        """What a linear's weights are, where they are kept: float32, (out, in)."""
        values = self._now[name].values.float()
        if not self._changes:
            return values
        of_row, of_column = self._steps[name]
        return values.addcmul(self._changes[name].detach() * of_row, of_column)

    def take(self, gradients: Mapping[str, Tensor]) -> None:
        """Give the parameters their gradients, float32, from those by the weights, (out, in), in `WIDER`."""
        for name, one in self._scores.items():
            one.grad = gradients[name].float() * self._values(name)
        for name, one in self._changes.items():
            of_row, of_column = self._steps[name]
            one.grad = (gradients[name].float() * of_row).mul_(of_column).mul_(self._now[name].free)

    def moved(self) -> None:
        """Adam has made a step."""
        for name, one in self._scores.items():
            now = self._now[name]  # whose weight is not looked at where values move, too
            keep = mask_from_scores(one.detach(), now.keep, self._pruned[name], now.pattern)
            self._now[name] = replace(now, keep=keep) if self._changes else now.with_mask(keep)

    def linears(self) -> dict[str, PrunedLinear]:
        """What they are now."""
        found = dict(self._now)
        for name in self._changes:
            one = found[name]
            found[name] = replace(one, values=self._values(name).to(one.values.dtype)).with_mask(one.keep)
        return found


def step_sizes(weight: Tensor, input_squares: Tensor) -> tuple[Tensor, Tensor]:
    """How large a step of each weight is at a rate of 1: what changes |W| · ‖X‖ by its mean in the row.

    Were it the same for all of a linear, most of what a step changes would be in the columns of huge inputs (a hundred
    times the median, some). Inputs smaller than the median of those that are not zero count as that: text that is not
    seen may have more.

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.

    Returns:
        Two factors, float32, (out, 1) and (in,).
    """
    sizes = input_squares.sqrt()
    alive = sizes[sizes > 0]
    at_least = sizes.clamp_min(alive.median()) if len(alive) else torch.ones_like(sizes)
    return wanda(weight, input_squares).mean(1, keepdim=True), 1 / at_least


def _descend(
    moving: _Moving,
    layer: DecoderLayer,
    distance: Distance,
    settings: RefineSettings,
    streams: ActivationStreams,
    where: str,
) -> Tuned:
    """Linears after the last pass that beats the untuned layer on the held-out windows; without them, after the last.

    Not after the pass that is nearest: steps get smaller, and an early pass is nearest by chance more often.
    """
    groups = moving.groups()
    if not groups:
        return Tuned(moving.linears(), ())
    steps = settings.steps(streams)
    total = settings.passes * len(steps)
    elements = streams.read(TARGET, slice(0, 1)).numel()
    optimizer = torch.optim.Adam(groups, betas=MOMENTUM, eps=SMALLEST, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    generator = torch.Generator().manual_seed(0)
    kept = moving.linears()
    judgements = [judge(layer, moving.weights(), distance, streams)] if settings.held_out else []
    for _ in range(settings.passes):
        for step in torch.randperm(len(steps), generator=generator).tolist():
            weights = {name: one.to(layer.dtype).detach().requires_grad_() for name, one in moving.weights().items()}
            sums = {name: torch.zeros_like(one, dtype=WIDER[layer.dtype]) for name, one in weights.items()}
            for sequence in steps[step].own:
                _add_gradients(sums, layer, weights, streams, slice(sequence, sequence + 1), distance)
            for name, one in sums.items():
                streams.ranks.add_tensor(one)
                one *= 2 / (elements * steps[step].sequences)  # of the mean square
                if not torch.isfinite(one.sum()):
                    raise NotFiniteError(
                        f"a gradient of {where}, {name}, holds NaN or Inf on the calibration text",
                        "compute with a wider range: --dtype bfloat16 or float32; or --refine swaps, or none",
                    )
            moving.take(sums)
            optimizer.step()
            optimizer.zero_grad()  # the next step's activations need the memory
            schedule.step()
            moving.moved()
        if settings.held_out:
            judgements.append(judge(layer, moving.weights(), distance, streams))
            if kept_pass(_errors(judgements)) != len(judgements) - 1:
                continue
        kept = moving.linears()
    return Tuned(kept, _errors(judgements), _concentration(judgements))


def _errors(judgements: list[Judgement]) -> tuple[float, ...]:
    return tuple(judgement.error for judgement in judgements)


def _concentration(judgements: list[Judgement]) -> Concentration | None:
    """Shares of the largest token and channel before tuning, and after the pass that is kept."""
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
    layer: DecoderLayer,
    weights: Mapping[str, Tensor],
    streams: ActivationStreams,
    sequence: slice,
    distance: Distance,
) -> None:
    """Of half the distance, summed over tokens and channels of one sequence, by the weights: (out, in), by linear."""
    hidden, target = streams.read(HIDDEN, sequence), streams.read(TARGET, sequence)

    def once() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        output = layer.output_with(weights, hidden)
        scaled, scale = scaled_by_sequence(distance.gradient(target, output.detach()), output.dtype)
        return scale, torch.autograd.grad(output, list(weights.values()), scaled, allow_unused=True)

    scale, found = layer.compute_gradients(once)
    power = scale.item()
    for name, one in zip(weights, found, strict=True):
        if one is not None:  # an expert may be given nothing
            sums[name].add_(one, alpha=power)


def _write_targets(
    layer: DecoderLayer, dense: Mapping[str, Tensor], target_mix: float, streams: ActivationStreams
) -> Distance:
    """What the layer's output should be, for every window; and how far it is from that."""
    layer.set_weights(dense)
    squares = []
    for batch in streams.batches():
        target = streams.read(DENSE + NEXT, batch) if target_mix else None
        if target is None or target_mix < 1:
            own = layer.output(streams.read(HIDDEN, batch))
            target = own if target is None else own.float().lerp(target.float(), target_mix).to(layer.dtype)
        streams.write(TARGET, batch, target)
        squares.append(usual_squares(target))
    total = torch.stack(squares).sum(0)
    streams.ranks.add_tensor(total)
    return Distance.of(total)
