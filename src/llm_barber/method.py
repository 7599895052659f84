"""The method (arXiv 2408.10631) on one decoder layer: initial masks, then each block's mask rebuilt in turn.

`_rebuild_block` reads like the paper; `docs/algorithm.md` has the passes and what they cost.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llm_barber.errors import ModelError
from llm_barber.initial import PrunedLinear
from llm_barber.job import Job
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.statistics import GradientSquares
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer, reconstruction_errors
from llm_barber.model.streams import DENSE, HIDDEN, NEXT, ActivationStreams
from llm_barber.refine import RefineSettings, advance_dense, refine_block
from llm_barber.report import BlockResult, LinearResult

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


def prune_layer(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    initial: InitialMasks,
    rebuild_settings: RebuildSettings | None,
    streams: ActivationStreams,
    refine_settings: RefineSettings | None = None,
) -> tuple[dict[str, Tensor], list[BlockResult]]:
    """Prune one decoder layer and move the stream through it; the pruned weights go by the checkpoint's names."""
    skeleton = job.skeleton
    prefix = job.layer_prefix(index)
    parameters = {name: tensors[prefix + name].to(skeleton.device) for name in skeleton.layer_names(index)}
    module = skeleton.load_layer(index, parameters)
    layer = DecoderLayer(module, job.architecture.linears, partial(skeleton.arguments, index))
    dense = {name: parameters[f"{name}.weight"] for name in job.architecture.linears}
    pruned = initial(index, layer, dense, streams)
    follows_dense = refine_settings is not None and refine_settings.target_mix > 0
    if follows_dense:
        layer.set_weights({name: weight.to(skeleton.dtype) for name, weight in dense.items()})
        advance_dense(layer, job.architecture.blocks, streams)
    blocks = []
    final: list[Block] = []
    for block in job.architecture.blocks:
        where = f"layer {index} {block.name}"
        last = block is job.architecture.blocks[-1]
        if rebuild_settings is None:
            masks = [Rebuilt(pruned[name].keep, 0, 0, 0) for name in block.linears]
            before = None
        else:
            masks, before = _rebuild_block(layer, block, final, dense, pruned, rebuild_settings, streams, last, where)
        weights = {
            name: apply_mask(pruned[name].values, mask.keep) for name, mask in zip(block.linears, masks, strict=True)
        }
        # Not rebuilt, a method's mask is what the method alone gives: SparseGPT's later layers see its updated weights.
        streamed = weights if rebuild_settings else {name: pruned[name].weight for name in block.linears}
        if refine_settings is not None:
            start = {
                name: replace(pruned[name], keep=mask.keep, weight=weights[name])
                for name, mask in zip(block.linears, masks, strict=True)
            }
            refined, swapped = refine_block(layer, block, final, dense, start, refine_settings, streams)
            weights = streamed = {name: refined[name].weight for name in block.linears}
            masks = [
                Rebuilt(refined[name].keep, mask.beneficial, mask.grown + swapped[name], mask.dropped + swapped[name])
                for name, mask in zip(block.linears, masks, strict=True)
            ]
        layer.set_weights({name: weight.to(skeleton.dtype) for name, weight in streamed.items()})
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
    if follows_dense:
        streams.rename(DENSE + NEXT, DENSE + HIDDEN)
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
    last: bool,
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
        if not last:  # blocks after it replay it, if nothing is swapped
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
