"""Tune the masks of a decoder layer, its kept weights, or both, by a short run of Adam.

The loss is the mean squared distance (`distance.py`) between the pruned layer's output, on the inputs that the pruned
model gives it, and its target (`target_output.py`). Masks follow from scores (`masking/scores.py`), which start as
Wanda's. Held-out windows choose the pass whose result is kept, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.method.clipped_gradients import clipped_gradients_by_weights
from llm_barber.method.distance import Distance
from llm_barber.method.gradient_sums import GradientSums
from llm_barber.method.held_out import Judgement, judge
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.tuned_parameters import TunedParameters
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import check_finite, output_gradients
from llm_barber.model.streams import HIDDEN, TARGET, ActivationStreams
from llm_barber.record.layers import Concentration, kept_pass
from llm_barber.settings.refining import RefineSettings

MOMENTUM = (0.9, 0.95)
EPSILON = 1e-12  # Adam's; so small that the scale of a model's states does not matter


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
    pruned: Mapping[str, PrunedLinear],
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
    return _descend(TunedParameters(layer, pruned, settings, streams), layer, distance, settings, streams, label)


def _descend(
    parameters: TunedParameters,
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
    sums = GradientSums(parameters.tuned_weights(), layer.dtype)
    judgements = [judge(layer, parameters.weights(), distance, streams)] if settings.held_out else []
    for _ in range(settings.passes):
        for step in torch.randperm(len(steps), generator=generator).tolist():
            weights = parameters.tuned_weights()
            sums.begin()
            for sequence in steps[step].local_sequences:
                window = slice(sequence, sequence + 1)
                sums.add(*_gradients(layer, weights, parameters, distance, streams, window))
            gradients = sums.finish()
            for gradient in gradients.values():
                streams.ranks.add_tensor(gradient)
                gradient *= 2 / (elements * steps[step].sequences)  # from half the sum of squares to their mean
            check_finite(gradients, label)
            parameters.set_gradients(gradients)
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


def _gradients(
    layer: DecoderLayer,
    weights: dict[str, Tensor],
    parameters: TunedParameters,
    distance: Distance,
    streams: ActivationStreams,
    sequence: slice,
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute one sequence's gradients by the tuned weights, (out, in), over a scale, float32 (1,).

    The loss is half the distance, summed over tokens and channels. Huge terms of its gradients are scaled down
    (`clipped_gradients.py`). Weights that the loss does not depend on have no gradient.
    """
    hidden, target = streams.read(HIDDEN, sequence), streams.read(TARGET, sequence)
    parts, scale = output_gradients(
        layer, parameters.frozen_weights | weights, hidden, lambda output: distance.gradient(target, output)
    )
    return clipped_gradients_by_weights([part for part in parts if part.name in weights]), scale
