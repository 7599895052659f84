"""The run: stream decoder layers from disk to disk, one after the other; `method/` prunes each."""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor

from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.output import work_folder
from llm_barber.checkpoint.packed_writer import PackedWriter
from llm_barber.checkpoint.state import START_AGAIN
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import UnfinishedRunError
from llm_barber.method.allocation import allocate
from llm_barber.method.block_pass import follows_dense
from llm_barber.method.head import prune_head
from llm_barber.method.layer import PrunedLayer, prune_layer
from llm_barber.method.reordering import find_order
from llm_barber.model.device import device_memory_checked, fixed_order
from llm_barber.model.streams import DENSE, HIDDEN, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.record.report import RunReport
from llm_barber.run.activation_memory import activation_memory
from llm_barber.run.embedding import copy_outside, embed
from llm_barber.run.finishing import finish_output, warn_of_results
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.resume_key import resume_key
from llm_barber.run.resuming import (
    finished_layers,
    hint_at_resuming,
    keep_activations_if_due,
    pass_layers,
    take_over_batch_size,
    tell_of_lost,
    used_by,
)
from llm_barber.run.writer import Writer
from llm_barber.settings.base import Format
from llm_barber.settings.presets import Allocation

Result = TypeVar("Result")
STAGES = ("embed", "reorder", "allocate", "layers", "read", "write", "total")


def run(prepared: PreparedRun, progress: Progress) -> RunReport:
    """Prune the model, layer by layer, from disk to disk; resume where an unfinished run stopped."""
    began = time.perf_counter()
    prepared.warn_of_settings(progress)
    ranks, sequences = prepared.job.ranks, len(prepared.job.tokens.input_ids)
    if prepared.config.resume:
        progress.stage("checking what is finished")
    order, checked = fixed_order(prepared.job.skeleton.device), device_memory_checked()
    hint = partial(hint_at_resuming, progress=progress, resumes=prepared.config.resume)
    with order, checked, _open_output(prepared) as writer, hint(writer):
        reached, activations = writer.read_activations()
        reached, writer.state = ranks.from_first((reached, writer.state))
        results = finished_layers(writer)
        tell_of_lost(writer, len(results), progress)
        prepared = take_over_batch_size(prepared, writer.state.used, progress)
        job = prepared.job
        seconds = {stage: writer.state.seconds.get(stage, 0.0) for stage in STAGES}
        began -= seconds["total"]
        streams, outside = _embed(prepared, writer, seconds, progress)
        _reorder(prepared, streams, writer, seconds, began, progress)
        with ReadAhead(job.source, job.steps[reached:], streams.device.type != "cpu") as ahead:
            _allocate(prepared, outside, streams, ahead, writer, seconds, began, progress)
            streams.restore(ranks.scatter(activations, sequences, streams.held_out, streams.memory.empty_off_device))
            activations = {}  # restore has copied them: free the memory
            if finished := results[reached:]:
                pass_layers(prepared, finished, ahead, writer, streams, progress)
            title = "pruning" if prepared.command == "prune" else "rebuilding"
            progress.start(title, len(job.steps), finished=len(results))
            for _ in results:
                writer.skip_shard()
            for index in range(len(results), len(job.steps)):
                start = time.perf_counter()
                tensors = ahead.take()
                read = time.perf_counter()
                pruned = _prune_step(prepared, index, tensors, streams, progress)
                computed = time.perf_counter()
                writer.write_shard({**tensors, **pruned.weights})
                written = time.perf_counter()
                seconds["read"] += read - start
                seconds["layers"] += computed - read
                seconds["write"] += written - computed
                seconds["total"] = written - began
                results.append(_result(index, written - start, pruned))
                _make_durable(prepared, results, seconds, writer, streams)
                seconds["write"] += time.perf_counter() - written
                progress.advance(_summary(results[-1]))
        _wait_for_shards(writer, seconds)
        seconds["total"] = time.perf_counter() - began
        report = finish_output(prepared, writer, results, seconds, used_by(prepared, writer, streams))
    warn_of_results(prepared, report, progress)
    return report


def _open_output(prepared: PreparedRun) -> Writer:
    """Writer of this process: the first process writes, the others follow."""
    config, job = prepared.config, prepared.job
    if not job.ranks.is_first:
        return Follower(work_folder(config.output))
    kind = PackedWriter if config.format is Format.PACKED else CheckpointWriter
    shards = len(job.outside_shards) + len(job.steps)
    key, repeatable = resume_key(prepared), prepared.config.runs_what_it_writes
    activations = prepared.activation_file_bytes
    return kind(config.output, shards, config.overwrite, job.bytes, key, config.resume, repeatable, activations)


def _embed(
    prepared: PreparedRun, writer: Writer, seconds: dict[str, float], progress: Progress
) -> tuple[ActivationStreams, dict[str, Tensor]]:
    """Embed the calibration tokens; copy the tensors outside the layers to the output on the way.

    Returns the activations, and the parameters outside the layers, by the model's names, that an allocation by the loss
    needs.
    """
    progress.stage("embedding the calibration tokens")
    start = time.perf_counter()
    job, refine_settings, skeleton = prepared.job, prepared.refine_settings, prepared.job.skeleton
    memory = activation_memory(job, prepared.config, prepared.recipe, writer)
    needs_loss = prepared.allocation is Allocation.LOSS and writer.state.sparsities is None
    names = skeleton.outside_names_and_head if needs_loss else skeleton.outside_names
    outside = copy_outside(job, writer, names)
    embedding = {name: outside[name] for name in skeleton.outside_names}
    streams = embed(job, embedding, refine_settings, memory)
    if follows_dense(refine_settings):
        streams.copy(HIDDEN, DENSE + HIDDEN)
    seconds["embed"] += time.perf_counter() - start
    return streams, outside if needs_loss else {}


def _reorder(
    prepared: PreparedRun,
    streams: ActivationStreams,
    writer: Writer,
    seconds: dict[str, float],
    began: float,
    progress: Progress,
) -> None:
    """Read the dense model's channels in another order from here on: the unfinished run's, or one that is found now.

    `began` as in `_allocate`.

    Raises:
        UnfinishedRunError: the order of the finished layers is lost, and another one was found.
    """
    job = prepared.job
    if not prepared.reorders:
        return
    content = job.ranks.from_first(writer.read_order())
    before = writer.state.channel_order
    if content is None:
        if before is not None:
            progress.warn(f"{ORDER_NAME} of the unfinished run is damaged or missing: the order is found again")
        find = partial(find_order, prepared.initial_masks, prepared.movable_channels, streams, progress)
        order = _pass_dense(find, "reorder", prepared, streams, seconds, began, progress)
        content = job.ranks.from_first(order.to_json())  # devices may round otherwise
        if writer.state.layers and before != hashlib.sha256(content).hexdigest():
            raise UnfinishedRunError(f"{ORDER_NAME} of the unfinished run is lost or damaged", START_AGAIN)
        writer.keep_order(content, seconds, used_by(prepared, writer, streams))
    job.source.order = ChannelOrder.from_json(content)


def _allocate(
    prepared: PreparedRun,
    outside: dict[str, Tensor],
    streams: ActivationStreams,
    ahead: ReadAhead,
    writer: Writer,
    seconds: dict[str, float],
    began: float,
    progress: Progress,
) -> None:
    """Give each linear its sparsity: the unfinished run's, or a new one from passes over the dense model.

    Args:
        prepared: the run.
        outside: as `allocate` takes it, which uses it up.
        streams: the activations.
        ahead: begins to read when these passes have read all layers.
        writer: keeps a new allocation with its seconds, and with the total of the run so far.
        seconds: by stage.
        began: time on the clock at which the run would have begun without interruptions.
        progress: is told of each layer.
    """
    initial_masks, allocation = prepared.initial_masks, prepared.allocation
    if initial_masks.budget is None or allocation is Allocation.UNIFORM:
        return
    sparsities = writer.state.sparsities
    if sparsities is None:
        spread = partial(allocate, allocation, initial_masks, outside, streams, initial_masks.budget, ahead, progress)
        found = _pass_dense(spread, "allocate", prepared, streams, seconds, began, progress)
        sparsities = prepared.job.ranks.from_first(found)  # devices may round otherwise
        writer.keep_sparsities(sparsities, seconds, used_by(prepared, writer, streams))
    initial_masks.set_sparsities(sparsities)


def _pass_dense(
    compute: Callable[[], Result],
    stage: str,
    prepared: PreparedRun,
    streams: ActivationStreams,
    seconds: dict[str, float],
    began: float,
    progress: Progress,
) -> Result:
    """Return what a pass over the dense model finds; count its seconds as a `stage`, and in the total since `began`."""
    start = time.perf_counter()
    result = compute()
    passed = time.perf_counter()
    seconds[stage] += passed - start
    seconds["total"] = passed - began
    return result


def _prune_step(
    prepared: PreparedRun, index: int, tensors: dict[str, Tensor], streams: ActivationStreams, progress: Progress
) -> PrunedLayer:
    """Prune a decoder layer, or, after the last layer, the output head."""
    job, masks, settings = prepared.job, prepared.initial_masks, prepared.refine_settings
    if index == job.layer_count:
        return prune_head(job, tensors, masks, settings, streams)
    return prune_layer(job, index, tensors, masks, prepared.rebuild_settings, settings, streams)


def _make_durable(
    prepared: PreparedRun,
    results: list[LayerResult],
    seconds: dict[str, float],
    writer: Writer,
    streams: ActivationStreams,
) -> None:
    """Begin to make the pruned layer durable and, when the schedule says so, the next layer's input.

    An input that cannot be computed again from the shards is written after every layer, before the layer is.
    """

    def keep_activations() -> None:
        streams.let_go(writer.unwritten)
        if len(results) < len(prepared.job.steps):
            keep_activations_if_due(prepared, len(results), writer, streams)

    if not prepared.config.runs_what_it_writes:
        keep_activations()
    writer.finish_layer(results[-1].model_dump(mode="json"), seconds, used_by(prepared, writer, streams))
    if prepared.config.runs_what_it_writes:
        keep_activations()


def _wait_for_shards(writer: Writer, seconds: dict[str, float]) -> None:
    """Wait until the last shard is durable."""
    start = time.perf_counter()
    writer.wait_for_shards()
    seconds["write"] += time.perf_counter() - start


def _result(index: int, seconds: float, pruned: PrunedLayer) -> LayerResult:
    return LayerResult(
        index=index,
        seconds=seconds,
        held_out=pruned.held_out,
        concentration=pruned.concentration,
        blocks=tuple(pruned.blocks),
    )


def _summary(layer: LayerResult) -> str:
    """Line of progress about a finished layer."""
    errors = [
        f"{block.name} error {block.error_before:.3g} → {block.error_after:.3g}"
        for block in layer.blocks
        if block.error_before is not None
    ]
    if layer.kept_pass is not None:  # tuning aims at another target than the blocks' own output
        before, after = layer.held_out[0], layer.held_out[layer.kept_pass]
        errors = [f"held-out distance from the target {before:.3g} → {after:.3g}"]
    swapped = sum(linear.grown for linear in layer.linears)
    weights = sum(linear.weights for linear in layer.linears)
    sparsity = sum(linear.pruned for linear in layer.linears) / max(1, weights)  # a layer may have no linears
    parts = [f"{sparsity:.1%} pruned", *([f"{swapped:,} swapped"] if errors else []), *errors]
    return ", ".join(parts)
