"""The run: an initial mask for every linear of a decoder layer, rebuilt block by block, layer after layer.

Reads like the method (arXiv 2408.10631): see `_rebuild_block`. Weights stream from disk to disk, one layer at a time.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llm_barber.checkpoint.source import RECORD_NAME
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.config import PruneConfig, RebuildConfig, RunSettings, rebuild_defaults
from llm_barber.errors import ModelError
from llm_barber.initial import CheckpointMasks, MethodMasks, PrunedLinear
from llm_barber.job import Job, prepare
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM
from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.statistics import GradientSquares
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer, reconstruction_errors
from llm_barber.model.streams import ActivationStreams
from llm_barber.progress import Progress, Silent
from llm_barber.report import (
    BlockResult,
    LayerResult,
    LinearResult,
    RunReport,
    model_card,
    peak_device_memory,
    peak_memory,
    versions,
)

HIDDEN = "hidden"  # the decoder layer's input
DENSE_OUTPUT = "dense output"  # the block's output with dense weights on the sparse stream


class InitialMasks(Protocol):
    """Gives the initial mask and pruned weights of each linear of a decoder layer."""

    def __call__(
        self, index: int, layer: DecoderLayer, dense: Mapping[str, Tensor], streams: ActivationStreams
    ) -> dict[str, PrunedLinear]:
        """One for each linear in `dense`; `streams` has the layer's input."""
        ...


@dataclass(frozen=True)
class RebuildSettings:
    """Granularity and ratio of the rebuild."""

    granularity: Granularity
    ratio: float


def prune(config: PruneConfig, progress: Progress | None = None) -> RunReport:
    """Prune a dense model and rebuild its mask; writes `config.output`.

    Raises:
        BarberError: anything that is wrong with settings, model, calibration or output; nothing is left behind.
    """
    progress = progress or Silent()
    target = config.target
    job = prepare(config.model, config, target if isinstance(target, NofM) else None, progress)
    rebuild_settings = None
    if config.rebuild:
        rebuild_settings = RebuildSettings(
            *rebuild_defaults(config.initial, config.granularity, config.rebuild_ratio, target)
        )
    initial = MethodMasks(config.initial, target, config.initial_granularity, config.keep_updates)
    method = config.initial
    report = _run("prune", config.model, config, job, initial, rebuild_settings, method, method, progress)
    if abs(report.sparsity - target.sparsity) > 0.01 * target.sparsity:
        progress.warn(
            f"sparsity {target.sparsity:g} was asked for, {report.sparsity:.4g} is what whole weights allow "
            "in comparison groups of this size"
        )
    return report


def rebuild(config: RebuildConfig, progress: Progress | None = None) -> RunReport:
    """Rebuild the mask of a pruned model with its dense one; writes `config.output`.

    Raises:
        BarberError: anything that is wrong with settings, models, calibration or output; nothing is left behind.
    """
    progress = progress or Silent()
    job = prepare(config.dense, config, config.target, progress)
    initial = CheckpointMasks(job, config.pruned, config.pattern)
    method = config.initial or initial.recorded_method
    settings = RebuildSettings(
        *rebuild_defaults(method, config.granularity, config.rebuild_ratio, initial.first_pattern)
    )
    label = f"mask of {config.pruned}"
    return _run("rebuild", config.dense, config, job, initial, settings, method, label, progress)


def _run(
    command: str,
    model: str,
    config: RunSettings,
    job: Job,
    initial: InitialMasks,
    rebuild_settings: RebuildSettings | None,
    method: str,
    label: str,
    progress: Progress,
) -> RunReport:
    """Stream the model through, layer by layer, and write the output."""
    began = time.perf_counter()
    seconds = {"embed": 0.0, "layers": 0.0, "read": 0.0, "write": 0.0}
    shards = len(job.outside_shards) + job.layer_count
    with CheckpointWriter(config.output, shards, config.overwrite, job.bytes) as writer:
        progress.stage("embedding the calibration tokens")
        streams = _embed(job, _copy_outside(job, writer))
        seconds["embed"] = time.perf_counter() - began
        results = []
        progress.start("pruning" if command == "prune" else "rebuilding", job.layer_count)
        for index in range(job.layer_count):
            start = time.perf_counter()
            tensors = job.source.read(job.layer_tensors[index])
            read = time.perf_counter()
            pruned, blocks = _layer(job, index, tensors, initial, rebuild_settings, streams)
            computed = time.perf_counter()
            writer.write_shard({**tensors, **pruned})
            seconds["read"] += read - start
            seconds["layers"] += computed - read
            seconds["write"] += time.perf_counter() - computed
            results.append(LayerResult(index=index, seconds=time.perf_counter() - start, blocks=tuple(blocks)))
            progress.advance(_summary(results[-1]))
        seconds["total"] = time.perf_counter() - began
        for path in job.source.companions():
            writer.copy(path)
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
            keep_updates=isinstance(config, PruneConfig) and config.keep_updates,
            calibration={
                "source": job.tokens.source,
                "sequences": job.tokens.input_ids.shape[0],
                "tokens": job.tokens.input_ids.shape[1],
                "sha256": job.tokens.digest,
            },
            device=str(job.skeleton.device),
            dtype=str(job.skeleton.dtype).removeprefix("torch."),
            versions=versions(),
            layers=tuple(results),
            seconds=seconds,
            peak_memory=peak_memory(),
            peak_device_memory=peak_device_memory(job.skeleton.device),
            files=writer.digests,
        )
        writer.write_file(RECORD_NAME, report.to_json().encode())
        writer.write_file("README.md", model_card(report).encode())
        writer.finish()
    if rebuild_settings is not None and report.swapped == 0:
        progress.warn(
            f"the rebuild swapped nothing: in comparison groups of this size, ratio {rebuild_settings.ratio:g} of the "
            "beneficial pairs is less than one; try --rebuild-ratio 0.1"
        )
    return report


def _copy_outside(job: Job, writer: CheckpointWriter) -> dict[str, Tensor]:
    """Copy what is outside the decoder layers; returns what embeds the tokens, by the model's names."""
    wanted = {job.source.resolve(name, job.base_prefix): name for name in job.skeleton.outside_names}
    kept: dict[str, Tensor] = {}
    for names in job.outside_shards:
        tensors = job.source.read(names)
        writer.write_shard(tensors)
        kept |= {wanted[name]: tensor for name, tensor in tensors.items() if name in wanted}
    return kept


def _embed(job: Job, weights: Mapping[str, Tensor]) -> ActivationStreams:
    """The input of the first decoder layer for all calibration sequences."""
    skeleton = job.skeleton
    streams = ActivationStreams(len(job.tokens.input_ids), job.batch_size, skeleton.device)
    skeleton.fill_outside(weights)
    for batch in streams.batches():
        skeleton.embed(job.tokens.input_ids[batch], partial(streams.write, HIDDEN, batch))
    skeleton.drop_outside()
    return streams


def _layer(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    initial: InitialMasks,
    rebuild_settings: RebuildSettings | None,
    streams: ActivationStreams,
) -> tuple[dict[str, Tensor], list[BlockResult]]:
    """Prune one decoder layer and move the stream through it; the pruned weights go by the checkpoint's names."""
    skeleton = job.skeleton
    prefix = job.layer_prefix(index)
    parameters = {name: tensors[prefix + name].to(skeleton.device) for name in skeleton.layer_names(index)}
    module = skeleton.load_layer(index, parameters)
    layer = DecoderLayer(module, job.architecture.linears, partial(skeleton.arguments, index))
    dense = {name: parameters[f"{name}.weight"] for name in job.architecture.linears}
    pruned = initial(index, layer, dense, streams)
    blocks = []
    final: list[Block] = []
    for block in job.architecture.blocks:
        where = f"layer {index} {block.name}"
        if rebuild_settings is None:
            masks = [Rebuilt(pruned[name].keep, 0, 0, 0) for name in block.linears]
            before = None
        else:
            masks, before = _rebuild_block(layer, block, final, dense, pruned, rebuild_settings, streams, where)
        weights = {
            name: apply_mask(pruned[name].values, mask.keep) for name, mask in zip(block.linears, masks, strict=True)
        }
        # Not rebuilt, a method's mask is what the method alone gives: SparseGPT's later layers see its updated weights.
        streamed = weights if rebuild_settings else {name: pruned[name].weight for name in block.linears}
        layer.set_weights({name: weight.to(skeleton.dtype) for name, weight in streamed.items()})
        last = block is job.architecture.blocks[-1]
        unchanged = all(torch.equal(weights[name], pruned[name].weight) for name in block.linears)
        if before is not None and unchanged and not last:
            after: float | None = before  # the output with the pruned weights, which is kept, is the final one
        else:
            after = _propagate(layer, block, final, last, streams, before is not None)
        if after is not None and not math.isfinite(after):
            raise _not_finite(f"the output of {where}")
        final.append(block)
        linears = tuple(
            LinearResult(
                name=name,
                shape=(mask.keep.shape[0], mask.keep.shape[1]),
                pruned=mask.keep.numel() - int(mask.keep.count_nonzero()),
                zeros=mask.keep.numel() - int(weights[name].count_nonzero()),
                beneficial_pairs=mask.beneficial,
                grown=mask.grown,
                dropped=mask.dropped,
                pattern=str(pruned[name].pattern) if pruned[name].pattern else None,
            )
            for name, mask in zip(block.linears, masks, strict=True)
        )
        blocks.append(BlockResult(name=block.name, error_before=before, error_after=after, linears=linears))
        for name, weight in weights.items():
            parameters[f"{name}.weight"] = weight
    skeleton.release_layer(index)
    return {f"{prefix}{name}.weight": parameters[f"{name}.weight"] for name in job.architecture.linears}, blocks


def _rebuild_block(
    layer: DecoderLayer,
    block: Block,
    final: list[Block],
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RebuildSettings,
    streams: ActivationStreams,
    where: str,
) -> tuple[list[Rebuilt], float]:
    """The method: x → y_sparse, y_dense → loss → G at the dense weights → S = |W| · sqrt(mean G²) → swap pairs.

    Returns the rebuilt masks in the block's order, and the mean reconstruction error before the rebuild.
    """
    dtype = next(layer.module.parameters()).dtype
    dense_weights = {name: dense[name].to(dtype) for name in block.linears}
    sparse_weights = {name: pruned[name].weight.to(dtype) for name in block.linears}
    squares = {name: GradientSquares(tuple(dense[name].shape), dense[name].device) for name in block.linears}
    total = 0.0
    for batch in streams.batches():
        hidden = streams.read(HIDDEN, batch)
        replays = {done.output: streams.read(done.output, batch) for done in final}
        layer.set_weights(sparse_weights)
        sparse_output = layer.block_output(block, hidden, replays)
        layer.set_weights(dense_weights)
        dense_output, losses = layer.block_gradients(block, hidden, sparse_output, replays, squares)
        streams.write(DENSE_OUTPUT, batch, dense_output)
        streams.write(block.output, batch, sparse_output)
        total += losses.double().sum().item()
    if not math.isfinite(total):
        raise _not_finite(f"the output of {where}")
    for name, statistic in squares.items():
        if not torch.isfinite(statistic.total.max()):  # a NaN is a maximum too
            raise _not_finite(f"a gradient of {where}, {name},")
    linears = [pruned[name] for name in block.linears]
    masks = rebuild_masks(
        keep=[linear.keep for linear in linears],
        saliency=[weight_gradient(pruned[name].values, squares[name].mean) for name in block.linears],
        granularity=settings.granularity,
        rebuild_ratio=settings.ratio,
        patterns=[linear.pattern for linear in linears],
        fixed=None if linears[0].fixed is None else [linear.fixed for linear in linears if linear.fixed is not None],
    )
    return masks, total / streams.sequences


def _propagate(
    layer: DecoderLayer,
    block: Block,
    final: list[Block],
    last: bool,
    streams: ActivationStreams,
    compare: bool,
) -> float | None:
    """Run the final block: its output is kept for the blocks after it, or the layer's becomes the next one's input.

    Returns the mean reconstruction error against the kept dense output, if `compare`; NaN if an activation is.
    """
    total = 0.0
    for batch in streams.batches():
        hidden = streams.read(HIDDEN, batch)
        replays = {done.output: streams.read(done.output, batch) for done in final}
        if last:
            output, following = layer.final_output(hidden, block, replays)
            streams.write(HIDDEN, batch, following)
        else:
            output = following = layer.block_output(block, hidden, replays)
            streams.write(block.output, batch, output)
        if compare:
            total += reconstruction_errors(streams.read(DENSE_OUTPUT, batch), output).double().sum().item()
        if not all(torch.isfinite(end) for end in torch.aminmax(following)):
            total = float("nan")
    return total / streams.sequences if compare or total != total else None


def _not_finite(what: str) -> ModelError:
    return ModelError(
        f"{what} holds NaN or Inf on the calibration text",
        "compute with a wider range: --dtype bfloat16 or float32; if it was, the model itself overflows",
    )


def _common_pattern(layers: list[LayerResult]) -> str:
    """The N:M of all linears, "unstructured", or "mixed"."""
    patterns = {linear.pattern or "unstructured" for layer in layers for linear in layer.linears}
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
