"""Tune the kept weights of a whole decoder layer against its output: a short run of Adam, masks fixed.

The loss is the mean squared distance of the layer's output, on the inputs that the pruned model gives it, from the
dense layer's; on these same inputs (`target_mix` 0), or on those of the dense model (1, as EBFT, 2024), or between.
Held-out windows stop it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llm_barber.initial import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import DENSE, HIDDEN, NEXT, ActivationStreams
from llm_barber.ranks import Ranks
from llm_barber.refine import RefineSettings

TARGET = "target"  # what the layer's output should be
RATE = 0.01  # of Adam, as a share of the root mean square of a linear's kept weights
MOMENTUM = (0.9, 0.95)
PATIENCE = 2  # passes without gain on held-out windows


def tune_layer(
    layer: DecoderLayer,
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RefineSettings,
    streams: ActivationStreams,
) -> dict[str, PrunedLinear]:
    """The layer's linears with better values.

    Args:
        layer: any weights.
        dense: dense weights, (out, in), by linear.
        pruned: masks and values to start from, by linear.
        settings: target mix; windows held out, if none all passes are made; most passes over the others.
        streams: the layer's input; for a mix, the dense model's output of it (`DENSE + NEXT`), too.
    """
    held_out, passes = settings.held_out, settings.tune
    _write_targets(layer, dense, settings.target_mix, streams)
    keeps = {name: one.keep for name, one in pruned.items()}
    values = {name: one.final.float().clone() for name, one in pruned.items()}
    groups = []
    for name, one in values.items():
        size = one.square().sum() / keeps[name].count_nonzero().clamp_min(1)
        groups.append({"params": [one.requires_grad_()], "lr": RATE * size.sqrt().item()})
    optimizer = torch.optim.Adam(groups, betas=MOMENTUM)
    training: list[slice | None] = [*settings.steps(streams)]
    steps = round(max(streams.ranks.every(len(training))))
    training += [None] * (steps - len(training))  # the steps of processes that have more sequences
    total = passes * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    def loss(batch: slice) -> Tensor:
        """Summed over the sequences of a batch, mean over tokens and channels."""
        weights = {name: (one * keeps[name]).to(layer.dtype) for name, one in values.items()}
        output = layer.output_with(weights, streams.read(HIDDEN, batch))
        error = (output.float() - streams.read(TARGET, batch).float()).square().mean()
        return error * int(batch.stop - batch.start)

    def held_out_error() -> float:
        with torch.no_grad():
            own = math.fsum(loss(batch).item() for batch in streams.split(held_out)[1])
        return streams.ranks.total(own)[0]

    generator = torch.Generator().manual_seed(0)
    best, lowest, without_gain = _copy(values), held_out_error(), 0
    for _ in range(passes):
        for step in torch.randperm(steps, generator=generator).tolist():
            batch = training[step]
            for one in values.values():
                one.grad = torch.zeros_like(one)
            if batch is not None:
                torch.autograd.backward(loss(batch))
            _mean_gradients(values, 0 if batch is None else batch.stop - batch.start, streams.ranks)
            optimizer.step()
            schedule.step()
        error = held_out_error()
        if held_out and error >= lowest:
            without_gain += 1
            if without_gain == PATIENCE:
                break
        else:
            best, lowest, without_gain = _copy(values), error, 0
    tuned = {}
    for name, linear in pruned.items():
        tuned[name] = replace(linear, values=best[name].to(linear.values.dtype)).with_mask(linear.keep)
    return tuned


def _write_targets(
    layer: DecoderLayer, dense: Mapping[str, Tensor], target_mix: float, streams: ActivationStreams
) -> None:
    """What the layer's output should be, for every window."""
    layer.set_weights(dense)
    for batch in streams.batches():
        target = streams.read(DENSE + NEXT, batch) if target_mix else None
        if target is None or target_mix < 1:
            own = layer.output(streams.read(HIDDEN, batch))
            target = own if target is None else own.float().lerp(target.float(), target_mix).to(layer.dtype)
        streams.write(TARGET, batch, target)


def _mean_gradients(values: Mapping[str, Tensor], sequences: int, ranks: Ranks) -> None:
    """Gradients of a step's mean loss from those of the sums over each process's sequences."""
    (every,) = ranks.total(sequences)
    for one in values.values():
        assert one.grad is not None
        ranks.add_tensor(one.grad)
        one.grad /= every


def _copy(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in values.items()}
