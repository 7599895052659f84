"""Prune one decoder layer: initial masks; each block rebuilt and refined; tuning; next input.

The rebuild is the published method (arXiv 2408.10631, `rebuild.py`); refining (`refine.py`) and tuning (`tune.py`) go
beyond it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llm_barber.errors import overflowed
from llm_barber.loading.job import Job
from llm_barber.method.block_pass import (
    BlockPass,
    block_errors,
    block_passes,
    dense_batches,
    follows_dense,
    measured_windows,
    propagate,
)
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.method.outcome import BlockOutcome, block_result
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.rebuild import RebuildSettings, rebuild_block
from llm_barber.method.refine import refine_block
from llm_barber.method.target_output import write_targets
from llm_barber.method.tune import Tuned, tune_layer
from llm_barber.model.architecture import Block, select_linears
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, TARGET, ActivationStreams
from llm_barber.record.layers import BlockResult, Concentration
from llm_barber.settings.refining import RefineSettings


@dataclass(frozen=True)
class PrunedLayer:
    """A decoder layer, or the output head, as it was pruned.

    `weights`: final weights by the checkpoint's names. `blocks`: results. `updated`: weights (out, in), by linear, that
    the activations went through; they differ from those that are written where a method's updates are not kept.
    `held_out`, `concentration`: of tuning (`tune.Tuned`).
    """

    weights: dict[str, Tensor]
    blocks: list[BlockResult]
    updated: dict[str, Tensor] = field(default_factory=dict)
    held_out: tuple[float, ...] = ()
    concentration: Concentration | None = None


def prune_layer(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    initial_masks: InitialMasks,
    rebuild_settings: RebuildSettings | None,
    refine_settings: RefineSettings | None,
    streams: ActivationStreams,
) -> PrunedLayer:
    """Prune one decoder layer and move the streams through it.

    Args:
        job: the opened model.
        index: of the layer.
        tensors: of the layer, by the checkpoint's names.
        initial_masks: gives the initial masks.
        rebuild_settings: None: masks are not rebuilt.
        refine_settings: None: neither linears are refined nor layers tuned.
        streams: the layer's input; afterwards the next layer's.

    Raises:
        NotFiniteError: an activation or a gradient holds NaN or Inf.
    """
    opened = _choose_initial_masks(job, index, tensors, initial_masks, refine_settings, streams)
    tuned: Tuned | None = None
    if opened.linears and refine_settings is not None and refine_settings.of_layers:
        initial_keeps = {name: linear.keep for name, linear in opened.linears.items()}
        outcomes = _prune_blocks(opened, rebuild_settings, refine_settings, streams, tunes=True)
        rebuilt = rebuild_settings is not None
        outcomes, tuned = _tune(opened, outcomes, initial_keeps, rebuilt, refine_settings, streams)
    else:
        outcomes = _prune_blocks(opened, rebuild_settings, refine_settings, streams, tunes=False)
    pruned = _collect_results(job, opened, tensors, outcomes, tuned)
    move_on(job, index, opened.layer, streams, follows_dense(refine_settings))
    return pruned


@dataclass
class _OpenLayer:
    """A decoder layer while it is pruned.

    `weights`: dense weights of all its prunable linears, (out, in). `linears`: the linears that are pruned, as they are
    so far. `blocks`: with these linears alone; a block may have none. `has_target`: the array `TARGET` has the layer's
    dense output already.
    """

    index: int
    layer: DecoderLayer
    weights: dict[str, Tensor]
    linears: dict[str, PrunedLinear]
    blocks: tuple[Block, ...]
    has_target: bool = False

    @property
    def dense(self) -> dict[str, Tensor]:
        """Dense weights, (out, in), of the linears that are pruned."""
        return {name: self.weights[name] for name in self.linears}

    def update(self, linears: Mapping[str, PrunedLinear]) -> None:
        """Take over a block's linears; all pruned linears of the layer have their pruned weights then."""
        self.linears.update(linears)
        self.layer.set_weights({name: linear.weight for name, linear in self.linears.items()})


def _choose_initial_masks(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    initial_masks: InitialMasks,
    refine_settings: RefineSettings | None,
    streams: ActivationStreams,
) -> _OpenLayer:
    """Open a layer and choose which weights of its linears the rebuild starts from.

    If choosing masks runs the layer, the same run gives tuning's target.
    """
    layer, weights = job.open_layer(index, tensors)
    takes_target = refine_settings is not None and refine_settings.aims_at_dense_layers
    linears = initial_masks(index, layer, weights, streams, TARGET if takes_target else None)
    layer.select(linears)
    blocks = select_linears(job.skeleton.blocks[index], linears)
    return _OpenLayer(index, layer, weights, linears, blocks, has_target=takes_target and initial_masks.runs_layers)


def _prune_blocks(
    opened: _OpenLayer,
    rebuild_settings: RebuildSettings | None,
    refine_settings: RefineSettings | None,
    streams: ActivationStreams,
    tunes: bool,
) -> list[BlockOutcome]:
    """Rebuild and refine the blocks in turn; a block is final before the next block is looked at.

    If the layer is tuned afterwards (`tunes`), tuning measures the errors after pruning and keeps the layer's output.
    """
    only_tuned = tunes and rebuild_settings is None and refine_settings is not None and not refine_settings.of_linears
    outcomes = []
    for block_pass in block_passes(opened.layer, opened.blocks, streams):
        if not block_pass.block.linears:
            for batch in dense_batches(refine_settings, streams):
                block_pass.advance_dense(batch)
        label = f"layer {opened.index} {block_pass.block.name}"
        outcome = _prune_block(block_pass, opened, rebuild_settings, refine_settings, label)
        unchanged = outcome.output_kept and all(
            torch.equal(linear.weight, opened.linears[name].weight) for name, linear in outcome.linears.items()
        )
        opened.update(outcome.linears)
        if only_tuned:  # later blocks need this output only for their error with the initial masks
            assert refine_settings is not None
            block_pass.keep_output(measured_windows(refine_settings, streams))
        elif not (tunes and block_pass.last):
            outcome = replace(outcome, error_after=_error_after(block_pass, outcome, unchanged, label))
        outcomes.append(outcome)
    return outcomes


def _prune_block(
    block_pass: BlockPass,
    opened: _OpenLayer,
    rebuild_settings: RebuildSettings | None,
    refine_settings: RefineSettings | None,
    label: str,
) -> BlockOutcome:
    """Rebuild a block's masks, then refine its linears one by one, as far as the settings ask for it."""
    initial_linears = {name: opened.linears[name] for name in block_pass.block.linears}
    outcome = BlockOutcome.initial(initial_linears)
    if not initial_linears:
        return outcome
    if rebuild_settings is not None:
        outcome = rebuild_block(block_pass, opened.dense, initial_linears, rebuild_settings, label)
    if refine_settings is not None:
        # Refining starts from the values that are written, which may not be the initial method's updated weights.
        linears = {name: linear.with_mask(linear.keep) for name, linear in outcome.linears.items()}
        refined = refine_block(block_pass, opened.dense, linears, refine_settings)
        if rebuild_settings is None:
            streams = block_pass.streams
            measured_from = streams.held_out_start if streams.held_out else 0
            outcome = replace(outcome, error_before=refined.error_before, measured_from=measured_from)
        outcome = outcome.refined(initial_linears, refined.linears, refined.rejected)
    return outcome


def _error_after(block_pass: BlockPass, outcome: BlockOutcome, unchanged: bool, label: str) -> float | None:
    """Propagate through a final block, unless it is unchanged and its output known; return its error."""
    error = outcome.error_before if unchanged else propagate(block_pass, outcome.measured_from)
    if error is not None and not math.isfinite(error):
        raise overflowed(f"the output of {label}")
    return error


def _tune(
    opened: _OpenLayer,
    outcomes: list[BlockOutcome],
    initial_keeps: Mapping[str, Tensor],
    rebuilt: bool,
    settings: RefineSettings,
    streams: ActivationStreams,
) -> tuple[list[BlockOutcome], Tuned]:
    """Tune the whole layer, measure its blocks, and propagate through it.

    Errors of blocks that were `rebuilt` are means over all windows, as their errors before are.
    """
    layer, dense = opened.layer, opened.dense
    distance = write_targets(layer, None if opened.has_target else dense, settings.target_mix, streams)
    tuned = tune_layer(layer, opened.linears, distance, settings, streams, f"layer {opened.index}")
    opened.linears = tuned.linears
    windows = list(streams.batches()) if rebuilt else measured_windows(settings, streams)
    errors = block_errors(layer, opened.blocks, dense, opened.linears, windows, streams)
    if any(error is not None and not math.isfinite(error) for error in errors):
        raise overflowed(f"the output of layer {opened.index}")
    last_pass = BlockPass(layer, opened.blocks[-1], (), streams, last=True)
    if math.isnan(propagate(last_pass, None) or 0):
        raise overflowed(f"the output of layer {opened.index}")
    outcomes = [
        replace(outcome.tuned(tuned, initial_keeps, settings.of_linears), error_after=error)
        for outcome, error in zip(outcomes, errors, strict=True)
    ]
    return outcomes, tuned


def _collect_results(
    job: Job,
    opened: _OpenLayer,
    tensors: Mapping[str, Tensor],
    outcomes: list[BlockOutcome],
    tuned: Tuned | None,
) -> PrunedLayer:
    """Final weights and counts of a layer; linears that are not pruned are counted, too."""
    pruned_weights = {name: linear.final for name, linear in opened.linears.items()}
    updated = {name: linear.weight for name, linear in opened.linears.items() if linear.has_updates}
    weights = opened.weights | pruned_weights
    results = [
        block_result(block, outcome, {name: weights[name] for name in block.linears})
        for block, outcome in zip(job.skeleton.blocks[opened.index], outcomes, strict=True)
    ]
    pruned = PrunedLayer(job.stored(opened.index, pruned_weights, tensors), results, updated)
    return pruned if tuned is None else replace(pruned, held_out=tuned.held_out, concentration=tuned.concentration)


def move_on(job: Job, index: int, layer: DecoderLayer, streams: ActivationStreams, with_dense: bool) -> None:
    """Release a layer whose output is in `DENSE_OUTPUT`, and make that output the next layer's input.

    `with_dense`: the dense model's stream, whose output is in `DENSE + NEXT`, moves on, too.
    """
    job.skeleton.tails[index] = layer.tail
    job.skeleton.release_layer(index)
    streams.swap(DENSE_OUTPUT, HIDDEN)
    if with_dense:
        streams.swap(DENSE + NEXT, DENSE + HIDDEN)
