"""Swaps that serve the block, not each linear by itself, for `variants.py --groups block-aware`. Not in the program.

Exact swaps lower the error p·G·p of a row's output, G = Σ x xᵀ over tokens. Here each token counts by how much of the
block's output the linear's output moves: by the squares of its gradients, whose mean over random directions of the
block's output is taken, and over rows in groups, each of which has a Gram matrix of its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_barber import method
from llm_barber.initial import PrunedLinear
from llm_barber.masking.statistics import TargetMoments
from llm_barber.model.streams import HIDDEN
from llm_barber.refine import Pass, Refined, _dense_inputs, _fitting, _levels, guarded
from llm_barber.refine_linear import Objective, refine_linear
from llm_barber.refine_settings import RefineSettings

SEED = 20250102  # of the random directions


class TokenWeights:
    """Σ over random directions of the mean squared gradient of a linear's outputs, (sequences, tokens, groups)."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self.total: Tensor | None = None

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor) -> None:
        """Add a batch, as `GradientSquares.update`."""
        squares = (output_gradient.float() * scale.view(-1, 1, 1)).square()
        found = squares.unflatten(2, (self._groups, -1)).mean(3)
        self.total = found if self.total is None else self.total + found


@contextmanager
def block_aware(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings without `probes`, `row_groups` and `power`; within, swaps serve the block, if they are given."""
    given = dict(settings)
    probes, groups, power = int(given.pop("probes", 0)), int(given.pop("row_groups", 1)), given.pop("power", 1.0)
    before = method.refine_block
    if probes:
        method.refine_block = BlockAware(probes, groups, float(power))
    try:
        yield given
    finally:
        method.refine_block = before


class BlockAware:
    """A `refine_block` whose Gram matrices weight tokens; swaps only, one process, no experts.

    Args:
        probes: random directions of the block's output.
        groups: of rows; they divide the rows of every linear.
        power: of the weights: 0 is `refine_block`.
    """

    def __init__(self, probes: int, groups: int, power: float) -> None:
        self._probes, self._groups, self._power = probes, groups, power
        self._made = torch.Generator().manual_seed(SEED)

    def __call__(
        self, work: Pass, dense: Mapping[str, Tensor], pruned: Mapping[str, PrunedLinear], settings: RefineSettings
    ) -> Refined:
        layer, block, streams = work.layer, work.block, work.streams
        dense_weights = {name: dense[name] for name in block.linears}
        current = {name: pruned[name].weight for name in block.linears}
        training, held_out = streams.split()
        refined: dict[str, PrunedLinear] = {}
        levels = _levels(layer.input_groups(block, streams.read(HIDDEN, next(streams.batches()))))
        steps = [step for level in levels for step in _fitting(level, dense)]
        for step in steps:
            first = [group[0] for group in step]
            names = [name for group in step for name in group]
            moments = []
            for batches in (training, held_out):
                found = {
                    name: [TargetMoments(dense[name].shape[1], streams.device) for _ in range(self._groups)]
                    for name in names
                }
                for batch in batches:
                    layer.set_weights(current)
                    weights = self._weights(work, names, batch)
                    inputs = work.inputs(first, batch)
                    layer.set_weights(dense_weights)
                    others = _dense_inputs(work, first, batch, step is steps[-1])
                    for group in step:
                        x, other = inputs[group[0]].float(), others[group[0]].float()
                        for name in group:
                            for index, one in enumerate(found[name]):
                                root = weights[name][..., index : index + 1].pow(self._power / 2)
                                one.update(x * root, other * root)
                moments.append(found)
            for name in names:
                refined[name] = self._refined(pruned[name], dense[name], moments[0][name], moments[1][name], settings)
                current[name] = refined[name].weight
        return guarded(work, dense_weights, pruned, refined, settings)

    def _weights(self, work: Pass, names: list[str], batch: slice) -> dict[str, Tensor]:
        """Of each token of a batch, (sequences, tokens, groups), by linear."""
        hidden, replays = work.streams.read(HIDDEN, batch), work.replays(batch)
        found = {name: TokenWeights(self._groups) for name in work.block.linears}
        output = work.layer.block_output(work.block, hidden, replays).float()
        for _ in range(self._probes):
            noise = torch.randn(output.shape, generator=self._made)
            work.layer.block_gradients(work.block, hidden, output - noise, replays, found)  # type: ignore[arg-type]
        size = output[0].numel()
        totals = {name: found[name].total for name in names}
        return {name: one * (size / 2) ** 2 / self._probes for name, one in totals.items() if one is not None}

    def _refined(
        self,
        pruned: PrunedLinear,
        dense: Tensor,
        training: list[TargetMoments],
        held_out: list[TargetMoments],
        settings: RefineSettings,
    ) -> PrunedLinear:
        parts = []
        for rows, one, other in zip(torch.arange(len(dense)).chunk(self._groups), training, held_out, strict=True):
            here = replace(
                pruned, keep=pruned.keep[rows], weight=pruned.weight[rows], values=pruned.values[rows],
                fixed=None if pruned.fixed is None else pruned.fixed[rows],
            )  # fmt: skip
            objectives = (Objective.of(found, settings.target_mix) for found in (one, other))
            parts.append(refine_linear(here, dense[rows], *objectives, settings).keep)
        return pruned.with_mask(torch.cat(parts))
