"""The run: decoder layer after decoder layer, streamed from disk to disk; what happens in a layer is `method.py`."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_barber.allocation import allocate
from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.checkpoint.packed_writer import PackedWriter
from llm_barber.checkpoint.source import RECORD_NAME
from llm_barber.checkpoint.state import source_key
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.checkpoint_masks import CheckpointMasks
from llm_barber.config import PruneConfig, RebuildConfig
from llm_barber.embedding import embed, memory_said, with_smaller_batches
from llm_barber.errors import NotFiniteError
from llm_barber.head import prune_head
from llm_barber.initial import FEW_TOKENS, MethodMasks
from llm_barber.job import Job
from llm_barber.memory import host_memory
from llm_barber.method import RebuildSettings, prune_layer
from llm_barber.model.streams import DENSE, HIDDEN
from llm_barber.model_card import model_card
from llm_barber.presets import Allocation, Reconstruct
from llm_barber.progress import Progress
from llm_barber.refine_settings import RefineSettings
from llm_barber.report import PAGE_NAME, KeptWeights, LayerResult, RunReport
from llm_barber.settings import Format, RunSettings
from llm_barber.usage import peak_device_memory, peak_memory, versions

# Settings that do not change the result.
UNLIKE = {"output", "overwrite", "resume", "report", "batch_size", "memory", "device_memory"}
STAGES = ("embed", "allocate", "layers", "read", "write", "total")


def run(
    command: str,
    model: str,
    config: RunSettings,
    job: Job,
    initial: MethodMasks | CheckpointMasks,
    rebuild_settings: RebuildSettings | None,
    method: str,
    label: str,
    progress: Progress,
) -> RunReport:
    """Stream the model through, layer by layer, and write the output; go on where an unfinished run stopped."""
    began = time.perf_counter()
    shards = len(job.outside_shards) + len(job.steps)
    ranks, sequences = job.ranks, len(job.tokens.input_ids)
    opened: CheckpointWriter | Follower = Follower(config.output)
    if ranks.first:
        key = _run_key(command, config, job)
        kind = PackedWriter if config.format is Format.PACKED else CheckpointWriter
        opened = kind(config.output, shards, config.overwrite, job.bytes, key, config.resume)
    with opened as writer, _told_how_to_go_on(writer, progress), ExitStack() as opened_files:
        finished, activations = writer.read_activations()
        finished, writer.state = ranks.from_first((finished, writer.state))
        activations = ranks.scatter(activations, sequences)
        results = [LayerResult.model_validate(layer) for layer in writer.state.layers]
        seconds = {stage: writer.state.seconds.get(stage, 0.0) for stage in STAGES}
        began -= seconds["total"]
        progress.stage("embedding the calibration tokens")
        start = time.perf_counter()
        pattern = initial.targets.pattern if isinstance(initial, MethodMasks) else initial.first_pattern
        refine_settings = RefineSettings.of(config, pattern, *job.tokens.input_ids.shape)
        with memory_said():
            streams = embed(job, _copy_outside(job, writer), refine_settings, host_memory(job, config, writer))
        if refine_settings is not None and refine_settings.target_mix:
            streams.copy(HIDDEN, DENSE + HIDDEN)
        seconds["embed"] += time.perf_counter() - start
        start = time.perf_counter()
        allocation = config.allocated_by if isinstance(config, PruneConfig) else Allocation.UNIFORM
        if isinstance(initial, MethodMasks) and allocation is not Allocation.UNIFORM:
            sparsities = writer.state.sparsities
            if sparsities is None:
                with memory_said():
                    sparsities = allocate(allocation, initial, streams, initial.targets.pattern.sparsity, progress)
            initial.targets = replace(initial.targets, allocated=sparsities)
            writer.state = writer.state.model_copy(update={"sparsities": sparsities})
            seconds["allocate"] += time.perf_counter() - start
        streams.restore(activations)
        progress.start("pruning" if command == "prune" else "rebuilding", len(job.steps))
        for layer in results:
            writer.skip_shard()
            progress.advance(_summary(layer))
        ahead = opened_files.enter_context(ReadAhead(job.source, job.steps[finished:], streams.pinned))
        for index in range(finished, len(job.steps)):
            start = time.perf_counter()
            tensors = ahead.take()
            read = time.perf_counter()
            compute = partial(prune_layer, job, index, tensors, initial, rebuild_settings, refine_settings, streams)
            release: Callable[[], None] = partial(job.skeleton.release_layer, index)
            if index == job.layer_count:
                compute = partial(prune_head, job, tensors, initial, refine_settings, streams)
                release = job.skeleton.drop_outside
            pruned, blocks = with_smaller_batches(compute, release, streams, progress)
            computed = time.perf_counter()
            writer.write_shard({**tensors, **pruned})
            written = time.perf_counter()
            seconds["read"] += read - start
            seconds["layers"] += computed - read
            seconds["write"] += written - computed
            seconds["total"] = written - began
            results.append(LayerResult(index=index, seconds=written - start, blocks=tuple(blocks)))
            kept = ranks.gather(streams.between_layers(), sequences)
            writer.finish_layer(results[-1].model_dump(mode="json"), kept, seconds, peak_memory())
            seconds["write"] += time.perf_counter() - written
            progress.advance(_summary(results[-1]))
        seconds["total"] = time.perf_counter() - began
        for path in job.source.companions():
            writer.copy(path, _untied(path) if job.prunes_head and path.name == "config.json" else None)
        report = RunReport(
            command=command,
            model=model,
            output=str(config.output),
            settings=config.model_dump(mode="json"),
            initial=method,
            method=label,
            pattern=_common_pattern(results),
            granularity=rebuild_settings.granularity if rebuild_settings else None,
            rebuild_ratio=rebuild_settings.ratio if rebuild_settings else None,
            refinement=refine_settings.words if refine_settings else None,
            allocation=allocation,
            kept_weights=_kept_weights(config),
            calibration={
                "source": job.tokens.source,
                "sequences": job.tokens.input_ids.shape[0],
                "tokens": job.tokens.input_ids.shape[1],
                "sha256": job.tokens.digest,
            },
            device=str(job.skeleton.device),
            dtype=str(job.skeleton.dtype).removeprefix("torch."),
            versions=versions(),
            processes=ranks.count,
            layers=tuple(results),
            seconds=seconds,
            peak_memory=max(peak_memory(), writer.state.peak_memory),
            peak_device_memory=peak_device_memory(job.skeleton.device),
            files=writer.digests,
        )
        writer.write_file(RECORD_NAME, report.to_json().encode())
        writer.write_file("README.md", model_card(report).encode())
        if config.report:
            from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

            writer.write_file(PAGE_NAME, run_page(report).encode())
        writer.finish()
    few = len(
        {(layer.index, one.name.rpartition(".")[0]) for layer in results for one in layer.linears if one.few_tokens}
    )
    if few:
        progress.warn(
            f"{few} experts were given fewer than {FEW_TOKENS} calibration tokens: their masks are "
            f"{'those of magnitude' if command == 'prune' else 'left as they were'}; more --samples reach more of them"
        )
    if rebuild_settings is not None and report.swapped == 0:
        progress.warn(
            f"the rebuild swapped nothing: in comparison groups of this size, ratio {rebuild_settings.ratio:g} of the "
            "beneficial pairs is less than one; try --rebuild-ratio 0.1"
        )
    return report


@contextmanager
def _told_how_to_go_on(writer: CheckpointWriter | Follower, progress: Progress) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if writer.resumable and not isinstance(error, NotFiniteError):
            count = len(writer.state.layers)
            progress.warn(f"{count} finished layers are kept in {writer.work}: the same command with --resume goes on")
        raise


def _run_key(command: str, config: RunSettings, job: Job) -> dict[str, Any]:
    """What a run's result depends on, each by the name that a message can say."""
    settings = config.model_dump(mode="json", exclude=UNLIKE)
    key = {"command": command, **settings, "model's files": source_key(job.source.folder)}
    if isinstance(config, RebuildConfig):
        key["pruned model's files"] = source_key(resolve_model(config.pruned, config.revision))
    return key | {
        "calibration text": job.tokens.digest,
        "device": str(job.skeleton.device),
        "dtype": str(job.skeleton.dtype),
        "version of a library": versions(),
    }


def _kept_weights(config: RunSettings) -> KeptWeights:
    if isinstance(config, PruneConfig) and config.keep_updates:
        return KeptWeights.UPDATED
    none = config.reconstruction is Reconstruct.NONE
    return KeptWeights.DENSE if none else KeptWeights(config.reconstruction.value)


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
    sparsity = sum(linear.pruned for linear in layer.linears) / weights
    parts = [f"{sparsity:.1%} pruned", *([f"{swapped:,} swapped"] if errors else []), *errors]
    return ", ".join(parts)
