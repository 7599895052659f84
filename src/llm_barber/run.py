"""The run: decoder layer after decoder layer, streamed from disk to disk; what happens in a layer is `method.py`."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from llm_barber.allocation import allocate
from llm_barber.assignment import Assignment, kept_weights, run_key
from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.packed_writer import PackedWriter
from llm_barber.checkpoint.place import work_folder
from llm_barber.checkpoint.state import Used
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.embedding import embed, with_smaller_batches
from llm_barber.head import prune_head
from llm_barber.initial import FEW_TOKENS, MethodMasks
from llm_barber.job import Job
from llm_barber.memory import activation_places
from llm_barber.method import PrunedLayer, prune_layer
from llm_barber.model.empty import auto_class
from llm_barber.model.streams import DENSE, HIDDEN, ActivationStreams
from llm_barber.model_card import model_card
from llm_barber.presets import Allocation
from llm_barber.progress import Progress
from llm_barber.report import PAGE_NAME, CalibrationResult, LayerResult, RunReport
from llm_barber.resuming import as_before, finished_layers, pass_layer, tell_of_lost, told_how_to_go_on, used_by
from llm_barber.settings import Format
from llm_barber.usage import versions

STAGES = ("embed", "allocate", "layers", "read", "write", "total")


def run(work: Assignment, progress: Progress) -> RunReport:
    """Stream the model through, layer by layer, and write the output; go on where an unfinished run stopped."""
    began = time.perf_counter()
    if work.refine_settings is not None and not work.refine_settings.held_out and work.config.guard != 0:
        progress.warn("no window can be held out of one: all of the refining is kept, unchecked; give more --samples")
    ranks, sequences = work.job.ranks, len(work.job.tokens.input_ids)
    if work.config.resume:
        progress.stage("checking what is finished")
    with _open_output(work) as writer, told_how_to_go_on(writer, progress):
        reached, activations = writer.read_activations()
        reached, writer.state = ranks.from_first((reached, writer.state))
        results = finished_layers(writer)
        tell_of_lost(writer, len(results), progress)
        work = as_before(work, writer.state.used, progress)
        job = work.job
        seconds = {stage: writer.state.seconds.get(stage, 0.0) for stage in STAGES}
        began -= seconds["total"]
        streams = _embed(work, writer, seconds, progress)
        _allocate(work, streams, writer, seconds, progress)
        streams.restore(ranks.scatter(activations, sequences, streams.held_out, streams.places.empty_off_device))
        activations = {}  # it has copied them
        progress.start("pruning" if work.command == "prune" else "rebuilding", len(job.steps))
        for layer in results:
            writer.skip_shard()
            progress.advance(_summary(layer))
        with ReadAhead(job.source, job.steps[reached:], streams.places.pinned) as ahead:
            if finished := results[reached:]:
                _pass_layers(work, finished, ahead, writer, streams, progress)
            for index in range(len(results), len(job.steps)):
                start = time.perf_counter()
                tensors = ahead.take()
                read = time.perf_counter()
                pruned = _prune_step(work, index, tensors, streams, progress)
                computed = time.perf_counter()
                writer.write_shard({**tensors, **pruned.weights})
                written = time.perf_counter()
                seconds["read"] += read - start
                seconds["layers"] += computed - read
                seconds["write"] += written - computed
                seconds["total"] = written - began
                results.append(_result(index, written - start, pruned))
                writer.finish_layer(
                    results[-1].model_dump(mode="json"),
                    # Written while the next layer is computed, which reads them, and changes others.
                    _gathered(work, streams) if index + 1 < len(job.steps) else {},
                    seconds,
                    used_by(work, writer, streams),
                )
                seconds["write"] += time.perf_counter() - written
                progress.advance(_summary(results[-1]))
        seconds["total"] = time.perf_counter() - began
        report = _write_rest(work, writer, results, seconds, used_by(work, writer, streams))
    _warn(work, report, progress)
    return report


def _open_output(work: Assignment) -> CheckpointWriter | Follower:
    """The first process writes, the others follow."""
    config, job = work.config, work.job
    if not job.ranks.first:
        return Follower(work_folder(config.output))
    kind = PackedWriter if config.format is Format.PACKED else CheckpointWriter
    shards = len(job.outside_shards) + len(job.steps)
    return kind(config.output, shards, config.overwrite, job.bytes, run_key(work), config.resume)


def _embed(
    work: Assignment, writer: CheckpointWriter | Follower, seconds: dict[str, float], progress: Progress
) -> ActivationStreams:
    """The first layer's input; what is outside the layers is copied on the way."""
    progress.stage("embedding the calibration tokens")
    start = time.perf_counter()
    job, refine_settings = work.job, work.refine_settings
    places = activation_places(job, work.config, work.recipe, writer)
    streams = embed(job, _copy_outside(job, writer), refine_settings, places, progress)
    if refine_settings is not None and refine_settings.target_mix:
        streams.copy(HIDDEN, DENSE + HIDDEN)
    seconds["embed"] += time.perf_counter() - start
    return streams


def _allocate(
    work: Assignment,
    streams: ActivationStreams,
    writer: CheckpointWriter | Follower,
    seconds: dict[str, float],
    progress: Progress,
) -> None:
    """Give each linear its sparsity: the one that an unfinished run found, or from a look at the dense model."""
    initial, allocation = work.initial, work.allocation
    if not isinstance(initial, MethodMasks) or allocation is Allocation.UNIFORM:
        return
    start = time.perf_counter()
    sparsities = writer.state.sparsities
    if sparsities is None:
        look = partial(allocate, allocation, initial, streams, initial.targets.pattern.sparsity, progress)
        sparsities = with_smaller_batches(look, work.job.skeleton.drop_outside, work.job, streams, progress)
        writer.keep_sparsities(sparsities, used_by(work, writer, streams))
    initial.targets = replace(initial.targets, allocated=sparsities)
    seconds["allocate"] += time.perf_counter() - start


def _prune_step(
    work: Assignment, index: int, tensors: dict[str, Tensor], streams: ActivationStreams, progress: Progress
) -> PrunedLayer:
    """Prune a decoder layer, or after the last one the output head."""
    job, settings = work.job, work.refine_settings
    compute = partial(prune_layer, job, index, tensors, work.initial, work.rebuild_settings, settings, streams)
    release: Callable[[], None] = partial(job.skeleton.release_layer, index)
    if index == job.layer_count:
        compute = partial(prune_head, job, tensors, work.initial, settings, streams)
        release = job.skeleton.drop_outside
    return with_smaller_batches(compute, release, job, streams, progress)


def _pass_layers(
    work: Assignment,
    finished: list[LayerResult],
    ahead: ReadAhead,
    writer: CheckpointWriter | Follower,
    streams: ActivationStreams,
    progress: Progress,
) -> None:
    """Move the streams through finished layers whose output was not durable yet, or is damaged."""
    job, settings = work.job, work.refine_settings
    follows_dense = settings is not None and settings.target_mix > 0
    for result in finished:
        progress.stage(f"through layer {result.index}, which is finished, once more")
        written = job.ranks.tensors_from_first(writer.read_shard(len(job.outside_shards) + result.index))
        compute = partial(pass_layer, job, result, ahead.take(), written, follows_dense, streams)
        with_smaller_batches(compute, partial(job.skeleton.release_layer, result.index), job, streams, progress)
    writer.keep_activations(_gathered(work, streams))


def _gathered(work: Assignment, streams: ActivationStreams) -> dict[str, Tensor]:
    """On the process that writes, what the next layer starts from, of all processes."""
    sequences = len(work.job.tokens.input_ids)
    return work.job.ranks.gather(streams.between_layers(), sequences, streams.held_out, streams.places.empty_off_device)


def _result(index: int, seconds: float, pruned: PrunedLayer) -> LayerResult:
    return LayerResult(index=index, seconds=seconds, held_out=pruned.held_out, blocks=tuple(pruned.blocks))


def _write_rest(
    work: Assignment,
    writer: CheckpointWriter | Follower,
    results: list[LayerResult],
    seconds: dict[str, float],
    used: Used,
) -> RunReport:
    """Companion files, record, model card and page; the output is complete then."""
    job = work.job
    for path in job.source.companions():
        untied = job.prunes_head and path.name == "config.json"
        writer.copy(path, job.source.folder, _untied(path) if untied else None)
    sequences, seqlen = job.tokens.input_ids.shape
    report = RunReport(
        command=work.command,
        model=work.model,
        output=str(work.config.output),
        settings=work.config.model_dump(mode="json"),
        resolved=work.resolved | {"batch_size": used.batch_size},
        initial=work.method,
        method=work.label,
        pattern=_common_pattern(results),
        granularity=work.rebuild_settings.granularity if work.rebuild_settings else None,
        rebuild_ratio=work.rebuild_settings.ratio if work.rebuild_settings else None,
        refinement=work.refine_settings.words if work.refine_settings else None,
        held_out=work.refine_settings.held_out if work.refine_settings else 0,
        allocation=work.allocation,
        kept_weights=kept_weights(work.config),
        loaded_by=auto_class(job.skeleton.model.config).__name__,
        calibration=CalibrationResult(
            source=job.tokens.source,
            sequences=sequences,
            tokens=seqlen,
            first_token=job.tokens.first_token,
            sha256=job.tokens.digest,
        ),
        device=str(job.skeleton.device),
        dtype=str(job.skeleton.dtype).removeprefix("torch."),
        versions=versions(),
        processes=job.ranks.count,
        layers=tuple(results),
        seconds=seconds,
        peak_memory=used.peak_memory,
        peak_device_memory=used.peak_device_memory,
        files=writer.digests,
        source=work.source,
    )
    writer.write_file(RECORD_NAME, report.to_json().encode())
    writer.write_file("README.md", model_card(report).encode())
    if work.config.report:
        from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

        writer.write_file(PAGE_NAME, run_page(report).encode())
    writer.finish()
    return report


def _warn(work: Assignment, report: RunReport, progress: Progress) -> None:
    """Say what went otherwise than a user would expect."""
    if work.job.skeleton.order.lost:
        progress.warn("gradients were added up in no fixed order, which this model has none of: another run may differ")
    few = {
        (layer.index, one.name.rpartition(".")[0]) for layer in report.layers for one in layer.linears if one.few_tokens
    }
    if few:
        left = "those of magnitude" if work.command == "prune" else "left as they were"
        progress.warn(
            f"{len(few)} experts were given fewer than {FEW_TOKENS} calibration tokens: their masks are "
            f"{left}; more --samples reach more of them"
        )
    if work.rebuild_settings is not None and report.swapped == 0:
        progress.warn(
            f"the rebuild swapped nothing: in comparison groups of this size, ratio {work.rebuild_settings.ratio:g} "
            "of the beneficial pairs is less than one; try --rebuild-ratio 0.1"
        )


def _copy_outside(job: Job, writer: CheckpointWriter | Follower) -> dict[str, Tensor]:
    """Copy what is outside the decoder layers; returns what embeds the tokens, by the model's names."""
    wanted = {job.source.place(name).tensor: name for name in job.skeleton.outside_names}
    kept: dict[str, Tensor] = {}
    for names in job.outside_shards:
        tensors = job.source.read(names)
        if writer.next_is_written:
            writer.skip_shard()
        else:
            writer.write_shard(tensors)
        kept |= {wanted[name]: tensor for name, tensor in tensors.items() if name in wanted}
    return kept


def _untied(path: Path) -> bytes:
    """A configuration whose output head has weights of its own."""
    content = json.loads(path.read_bytes())
    return (json.dumps({**content, "tie_word_embeddings": False}, indent=2, ensure_ascii=False) + "\n").encode()


def _common_pattern(layers: list[LayerResult]) -> str:
    """The N:M of all pruned linears, "unstructured", or "mixed"."""
    patterns = {linear.pattern or "unstructured" for layer in layers for linear in layer.linears if linear.pruned}
    return patterns.pop() if len(patterns) == 1 else "mixed"


def _summary(layer: LayerResult) -> str:
    """What the progress line says of a finished layer."""
    errors = [
        f"{block.name} error {block.error_before:.3g} → {block.error_after:.3g}"
        for block in layer.blocks
        if block.error_before is not None
    ]
    swapped = sum(linear.grown for linear in layer.linears)
    weights = sum(linear.weights for linear in layer.linears)
    sparsity = sum(linear.pruned for linear in layer.linears) / max(1, weights)  # a layer may have no linears
    parts = [f"{sparsity:.1%} pruned", *([f"{swapped:,} swapped"] if errors else []), *errors]
    return ", ".join(parts)
