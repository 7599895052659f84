"""The method (arXiv 2408.10631) on one decoder layer: initial masks, then each block's mask rebuilt in turn.

`_rebuild_block` reads like the paper; `docs/method/paper.md` has the passes and what they cost.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llm_barber.errors import overflowed
from llm_barber.loading.job import Job
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.masking.statistics import GradientSquares
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine import Pass, block_errors, dense_batches, measured_windows, refine_block
from llm_barber.method.tune import Tuned, tune_layer
from llm_barber.model.architecture import Block, select_linears
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import reconstruction_errors
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.record.layers import BlockResult, LinearResult
from llm_barber.settings.refining import RefineSettings


class InitialMasks(Protocol):
    """Gives the initial mask and pruned weights of the linears of a decoder layer."""

    def __call__(
        self, index: int, layer: DecoderLayer, dense: Mapping[str, Tensor], streams: ActivationStreams
    ) -> dict[str, PrunedLinear]:
        """One for each linear in `dense` that is pruned; the others stay. `streams` has the layer's input."""
        ...


@dataclass(frozen=True)
class RebuildSettings:
    """Granularity and ratio of the rebuild; linears with N:M may have a granularity of their own."""

    granularity: Granularity
    ratio: float
    pattern_granularity: Granularity | None = None


@dataclass(frozen=True)
class PrunedLayer:
    """What became of a decoder layer: weights by the checkpoint's names, its blocks, and `held_out` of `tune.Tuned`."""

    weights: dict[str, Tensor]
    blocks: list[BlockResult]
    held_out: tuple[float, ...] = ()


def prune_layer(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    initial: InitialMasks,
    rebuild_settings: RebuildSettings | None,
    refine_settings: RefineSettings | None,
    streams: ActivationStreams,
) -> PrunedLayer:
    """Prune one decoder layer and move the stream through it."""
    skeleton = job.skeleton
    layer, every = job.open_layer(index, tensors)
    pruned = initial(index, layer, every, streams)
    layer.select(pruned)
    dense = {name: every[name] for name in pruned}
    blocks = select_linears(skeleton.blocks[index], pruned)
    follows_dense = refine_settings is not None and refine_settings.target_mix > 0
    tuning = refine_settings if pruned and refine_settings is not None and refine_settings.of_layers else None
    # Of blocks that nothing changes before their layer is tuned, only the error is wanted.
    waits = tuning is not None and not tuning.of_linears and rebuild_settings is None
    first = {name: one.keep for name, one in pruned.items()} if tuning is not None else {}
    outcomes: list[tuple[Block, Outcome, float | None]] = []
    held_out: tuple[float, ...] = ()
    final: list[Block] = []
    for block in blocks:
        work = Pass(layer, block, final, streams, last=block is blocks[-1])
        for batch in () if block.linears else dense_batches(refine_settings, streams):
            work.advance_dense(batch)
        outcome = _prune_block(work, dense, pruned, rebuild_settings, refine_settings, index)
        unchanged = all(torch.equal(one.weight, pruned[name].weight) for name, one in outcome.linears.items())
        pruned.update(outcome.linears)
        layer.set_weights({name: one.weight for name, one in pruned.items()})
        if tuning is not None and (waits or work.last):
            for batch in () if work.last else measured_windows(tuning, streams):
                streams.write(block.output, batch, work.output(batch))
            outcomes.append((block, outcome, None))
            final.append(block)
            continue
        after = outcome.error_before  # its output with these weights is there already, if nothing has changed
        if not (outcome.output_kept and unchanged) or work.last:
            after = _propagate(work, outcome.measured_from)
        if after is not None and not math.isfinite(after):
            raise overflowed(f"the output of layer {index} {block.name}")
        outcomes.append((block, outcome, after))
        final.append(block)
    if tuning is not None:
        tuned = tune_layer(layer, dense, pruned, tuning, streams, f"layer {index}")
        pruned, held_out = tuned.linears, tuned.held_out
        windows = measured_windows(tuning, streams) if rebuild_settings is None else list(streams.batches())
        errors = block_errors(layer, blocks, dense, pruned, windows, streams)
        outcomes = [
            (block, outcome.tuned(tuned, first, tuning.of_linears), error)
            for (block, outcome, _), error in zip(outcomes, errors, strict=True)
        ]
        if math.isnan(_propagate(Pass(layer, blocks[-1], [], streams, last=True), None) or 0):
            raise overflowed(f"the output of layer {index}")
    weights = {name: one.final for name, one in pruned.items()}
    results = [
        result_of(block, outcome, after, {name: weights.get(name, every[name]) for name in block.linears})
        for block, (_, outcome, after) in zip(skeleton.blocks[index], outcomes, strict=True)
    ]
    written = job.stored(index, weights, tensors)
    skeleton.tails[index] = layer.tail
    skeleton.release_layer(index)
    # Last of all: until here the layer can be pruned again, if memory runs out.
    streams.swap(DENSE_OUTPUT, HIDDEN)
    if follows_dense:
        streams.swap(DENSE + NEXT, DENSE + HIDDEN)
    return PrunedLayer(written, results, held_out)


@dataclass(frozen=True)
class Outcome:
    """What became of a block: its linears, their masks with what was swapped, the mean error before.

    `measured_from`: the first of the sequences that errors are means over. `output_kept`: the block's output before is.
    """

    linears: dict[str, PrunedLinear]
    masks: dict[str, Rebuilt]
    error_before: float | None = None
    measured_from: int | None = None
    output_kept: bool = False
    rejected: bool = False

    def tuned(self, tuned: Tuned, first: Mapping[str, Tensor], after_linears: bool) -> "Outcome":
        """After the layer was tuned.

        Args:
            tuned: what became of it.
            first: the initial keep masks.
            after_linears: its linears had been refined one by one before.
        """
        linears = {name: tuned.linears[name] for name in self.linears}
        masks = {
            name: Rebuilt.between(first[name], linears[name].keep, mask.beneficial) for name, mask in self.masks.items()
        }
        rejected = bool(linears) and tuned.rejected and (self.rejected or not after_linears)
        return replace(self, linears=linears, masks=masks, rejected=rejected)


def _prune_block(
    work: Pass,
    dense: Mapping[str, Tensor],
    initial: Mapping[str, PrunedLinear],
    rebuild_settings: RebuildSettings | None,
    refine_settings: RefineSettings | None,
    index: int,
) -> Outcome:
    """Rebuild a block's masks and refine them, as far as that is asked for."""
    block = work.block
    if not block.linears:
        return Outcome({}, {})
    now = {name: initial[name] for name in block.linears}
    before, measured_from, rejected = None, None, False
    masks = {name: Rebuilt(one.keep, 0, 0, 0) for name, one in now.items()}
    where = f"layer {index} {block.name}"
    if rebuild_settings is not None:
        now, masks, before = _rebuild_block(work, dense, now, rebuild_settings, where)
        measured_from = 0
    if refine_settings is not None:
        now = {name: one.with_mask(one.keep) for name, one in now.items()}
        refined = refine_block(work, dense, now, refine_settings)
        if before is None:
            before = refined.errors[0]
            measured_from = work.streams.held_out_start if work.streams.held_out else 0
        now, rejected = refined.linears, refined.rejected
        masks = {
            name: Rebuilt.between(initial[name].keep, now[name].keep, mask.beneficial) for name, mask in masks.items()
        }
    output_kept = rebuild_settings is not None and not work.last
    return Outcome(now, masks, before, measured_from, output_kept, rejected)


def result_of(block: Block, outcome: Outcome, after: float | None, weights: Mapping[str, Tensor]) -> BlockResult:
    """The counts of a block's linears, whose final weights are `weights`; those that took no part are there, too."""
    linears = []
    for name, weight in weights.items():
        found = LinearResult(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            pruned=0,
            zeros=weight.numel() - int(weight.count_nonzero()),
        )
        if name in outcome.masks:
            mask, pattern = outcome.masks[name], outcome.linears[name].pattern
            counts = {
                "pruned": mask.keep.numel() - int(mask.keep.count_nonzero()),
                "beneficial_pairs": mask.beneficial,
                "grown": mask.grown,
                "dropped": mask.dropped,
                "pattern": str(pattern) if pattern else None,
                "few_tokens": bool(outcome.linears[name].few_tokens),
            }
            found = found.model_copy(update=counts)
        linears.append(found)
    return BlockResult(
        name=block.name,
        error_before=outcome.error_before,
        error_after=after,
        linears=tuple(linears),
        rejected=outcome.rejected,
    )


def _rebuild_block(
    work: Pass,
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RebuildSettings,
    where: str,
) -> tuple[dict[str, PrunedLinear], dict[str, Rebuilt], float]:
    """The method: x → y_sparse, y_dense → loss → G at the dense weights → S = |W| · sqrt(mean G²) → swap pairs.

    Returns the linears with their rebuilt masks, what was swapped, and the mean reconstruction error before that.
    """
    layer, block, streams = work.layer, work.block, work.streams
    dense_weights = {name: dense[name] for name in block.linears}
    sparse_weights = {name: pruned[name].weight for name in block.linears}
    squares = {name: GradientSquares(tuple(dense[name].shape), dense[name].device) for name in block.linears}
    total = 0.0
    layer.forget_tokens()
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), work.replays(batch)
        layer.set_weights(sparse_weights)
        sparse_output = layer.block_output(block, hidden, replays)
        layer.set_weights(dense_weights)
        dense_output, losses = layer.block_gradients(block, hidden, sparse_output, replays, squares)
        streams.write(DENSE_OUTPUT, batch, dense_output)
        if not work.last:  # blocks after it replay it, if nothing is swapped
            streams.write(block.output, batch, sparse_output)
        total += losses.double().sum().item()
    (total,) = streams.ranks.total(total)
    if not math.isfinite(total):
        raise overflowed(f"the output of {where}")
    for statistic in squares.values():
        streams.ranks.add(statistic)
    for name, statistic in squares.items():
        if not torch.isfinite(statistic.total.max()):  # a NaN is a maximum too
            raise overflowed(f"a gradient of {where}, {name},")
    now = freeze_linears_with_few_tokens({name: pruned[name] for name in block.linears}, layer, streams.ranks, calls=2)
    linears = list(now.values())
    found = rebuild_masks(
        keep=[linear.keep for linear in linears],
        saliency=[weight_gradient(pruned[name].values, squares[name].mean) for name in block.linears],
        granularity=settings.granularity,
        rebuild_ratio=settings.ratio,
        patterns=[linear.pattern for linear in linears],
        fixed=None
        if all(linear.fixed is None for linear in linears)
        else [torch.zeros_like(linear.keep) if linear.fixed is None else linear.fixed for linear in linears],
        pattern_granularity=settings.pattern_granularity,
    )
    masks = dict(zip(block.linears, found, strict=True))
    return {name: one.with_mask(masks[name].keep) for name, one in now.items()}, masks, total / streams.all_sequences


def _propagate(work: Pass, measured_from: int | None) -> float | None:
    """Run the final block: its output is kept for the blocks after it, or the layer's in `DENSE_OUTPUT` for the next.

    Returns the mean reconstruction error over the sequences from a first one on, whose dense output is kept, if there
    is one; NaN if an activation is.
    """
    layer, block, streams = work.layer, work.block, work.streams
    total, compared, finite = 0.0, 0, True
    measured_from = streams.sequences if measured_from is None else measured_from
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), work.replays(batch)
        if work.last:
            output, following = layer.final_output(hidden, block, replays)
        else:
            output = following = layer.block_output(block, hidden, replays)
            streams.write(block.output, batch, output)
        first = max(batch.start, measured_from)
        if first < batch.stop:
            dense_output = streams.read(DENSE_OUTPUT, slice(first, batch.stop))
            total += reconstruction_errors(dense_output, output[first - batch.start :]).double().sum().item()
            compared += batch.stop - first
        if work.last:
            streams.write(DENSE_OUTPUT, batch, following)  # whose place is not needed any more
        finite = finite and all(bool(torch.isfinite(end)) for end in torch.aminmax(following))
    total, all_compared, broken = streams.ranks.total(total, compared, not finite)
    if broken:
        return float("nan")
    return total / all_compared if all_compared else None
