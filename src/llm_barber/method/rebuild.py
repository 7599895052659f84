"""Rebuild the masks of one block (arXiv 2408.10631): `rebuild_block` reads like the paper."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.errors import overflowed
from llm_barber.masking.gradient_squares import GradientSquares
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.method.block_pass import BlockPass
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.outcome import BlockOutcome
from llm_barber.method.pruned_linear import PrunedLinear, fixed_weights
from llm_barber.model.gradients import block_gradients
from llm_barber.model.streams import DENSE_OUTPUT, HIDDEN


@dataclass(frozen=True)
class RebuildSettings:
    """Granularity and ratio of the rebuild; linears with N:M may have a granularity of their own."""

    granularity: Granularity
    ratio: float
    pattern_granularity: Granularity | None = None


def rebuild_block(
    block_pass: BlockPass,
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RebuildSettings,
    label: str,
) -> BlockOutcome:
    """Rebuild a block: x → y_sparse, y_dense → loss → G at dense weights → S = |W|·sqrt(mean G²) → swaps.

    The block's output with the initial masks is kept: later blocks replay it if nothing is swapped. Its dense output is
    kept as `DENSE_OUTPUT`.

    Args:
        block_pass: the block.
        dense: dense weights, (out, in), by linear.
        pruned: initial masks and values, by linear.
        settings: granularity and ratio.
        label: the layer and block, for a message.

    Raises:
        NotFiniteError: an output or a gradient holds NaN or Inf.
    """
    layer, block, streams = block_pass.layer, block_pass.block, block_pass.streams
    dense_weights = {name: dense[name] for name in block.linears}
    sparse_weights = {name: pruned[name].weight for name in block.linears}
    squares = {name: GradientSquares(tuple(dense[name].shape), dense[name].device) for name in block.linears}
    losses_sum = torch.zeros((), dtype=torch.float64, device=streams.device)
    layer.forget_tokens()
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), block_pass.replays(batch)
        layer.set_weights(sparse_weights)
        sparse_output = layer.block_output(block, hidden, replays)
        layer.set_weights(dense_weights)
        dense_output, losses = block_gradients(layer, block, hidden, sparse_output, replays, squares)
        streams.write(DENSE_OUTPUT, batch, dense_output)
        if not block_pass.last:  # blocks after it replay it, if nothing is swapped
            streams.write(block.output, batch, sparse_output)
        losses_sum += losses.double().sum()
    (total,) = streams.ranks.total(losses_sum.item())
    if not math.isfinite(total):
        raise overflowed(f"the output of {label}")
    for statistic in squares.values():
        streams.ranks.add(statistic)
    maxima = torch.stack([statistic.total.max() for statistic in squares.values()])  # a NaN is a maximum too
    for name, finite in zip(squares, maxima.isfinite().tolist(), strict=True):
        if not finite:
            raise overflowed(f"a gradient of {label}, {name},")
    linears = freeze_linears_with_few_tokens(
        {name: pruned[name] for name in block.linears}, layer, streams.ranks, calls=2
    )
    saliency = [weight_gradient(linear.values, squares[name].mean) for name, linear in linears.items()]
    masks = dict(zip(linears, _swap_pairs(list(linears.values()), saliency, settings), strict=True))
    rebuilt = {name: linear.with_mask(masks[name].keep) for name, linear in linears.items()}
    error = total / streams.all_sequences
    return BlockOutcome(rebuilt, masks, error, measured_from=0, output_kept=not block_pass.last)


def _swap_pairs(linears: list[PrunedLinear], saliency: list[Tensor], settings: RebuildSettings) -> list[Rebuilt]:
    return rebuild_masks(
        keep=[linear.keep for linear in linears],
        saliency=saliency,
        granularity=settings.granularity,
        rebuild_ratio=settings.ratio,
        patterns=[linear.pattern for linear in linears],
        fixed=fixed_weights(linears),
        pattern_granularity=settings.pattern_granularity,
    )
