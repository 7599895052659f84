"""Refine a block's masks and weights: exact swaps and least squares, on the inputs that its pruned predecessors give.

The linears of a block are taken in the order in which data flows through them: q, k and v, then the output projection
on their pruned output; gate and up, then down. Each one's target is its dense output, on inputs that lie between those
of the sparse model (`target_mix` 0) and those of the dense model (1): then it makes up for errors of earlier layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from llm_barber.initial import PrunedLinear
from llm_barber.masking.least_squares import least_squares
from llm_barber.masking.selection import apply_mask
from llm_barber.masking.statistics import TargetMoments
from llm_barber.masking.swaps import swap_pairs
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import DENSE, HIDDEN, NEXT, ActivationStreams


@dataclass(frozen=True)
class RefineSettings:
    """`swaps`: most swaps a row. `target_mix`: see above. `steps`: of least squares, 0: weights stay the dense ones.

    `damping`: of least squares, as a share of the mean diagonal of the Gram matrix.
    """

    swaps: int
    target_mix: float
    steps: int
    damping: float


def refine_block(
    layer: DecoderLayer,
    block: Block,
    final: list[Block],
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RefineSettings,
    streams: ActivationStreams,
) -> tuple[dict[str, PrunedLinear], dict[str, int]]:
    """The block's linears, refined, and how many weights of each were swapped.

    Args:
        layer: with its dense weights.
        block: which.
        final: the blocks before it, whose outputs are in the streams.
        dense: dense weights, (out, in), by linear.
        pruned: what to start from, by linear.
        settings: how.
        streams: the layer's input and the outputs of final blocks; for a mix, of the dense model too.
    """
    dtype = next(layer.module.parameters()).dtype
    dense_weights = {name: dense[name].to(dtype) for name in block.linears}
    current = {name: pruned[name].weight.to(dtype) for name in block.linears}
    refined: dict[str, PrunedLinear] = {}
    swapped: dict[str, int] = {}
    first = next(streams.batches())
    for group in layer.input_groups(block, streams.read(HIDDEN, first)):
        name = group[0]
        moments = TargetMoments(dense[name].shape[1], dense[name].device)
        for batch in streams.batches():
            layer.set_weights(current)
            inputs = layer.input_of(name, streams.read(HIDDEN, batch), _replays(streams, final, batch, ""))
            others = None
            if settings.target_mix:
                layer.set_weights(dense_weights)
                others = layer.input_of(
                    name, streams.read(DENSE + HIDDEN, batch), _replays(streams, final, batch, DENSE)
                )
            moments.update(inputs, others)
        for name in group:
            one = pruned[name]
            weight = dense[name].float()
            linear = settings.target_mix * (weight @ moments.difference) if settings.target_mix else None
            keep, count = swap_pairs(one.keep, weight, moments.gram, settings.swaps, linear, one.pattern, one.fixed)
            values = one.values
            if settings.steps:
                solved = least_squares(keep, weight, moments.gram, linear, settings.steps, settings.damping)
                values = solved.to(one.values.dtype)
            refined[name] = replace(one, keep=keep, values=values, weight=apply_mask(values, keep))
            swapped[name] = int(count.sum())
            current[name] = refined[name].weight.to(dtype)
    return refined, swapped


def advance_dense(layer: DecoderLayer, blocks: tuple[Block, ...], streams: ActivationStreams) -> None:
    """Run the dense layer on the dense stream: its blocks' outputs are kept, its output waits as `DENSE + NEXT`."""
    for batch in streams.batches():
        hidden = streams.read(DENSE + HIDDEN, batch)
        replays: dict[str, Tensor] = {}
        for block in blocks[:-1]:
            replays[block.output] = layer.block_output(block, hidden, replays)
            streams.write(DENSE + block.output, batch, replays[block.output])
        output, following = layer.final_output(hidden, blocks[-1], replays)
        streams.write(DENSE + blocks[-1].output, batch, output)
        streams.write(DENSE + NEXT, batch, following)


def _replays(streams: ActivationStreams, final: list[Block], batch: slice, stream: str) -> dict[str, Tensor]:
    return {done.output: streams.read(stream + done.output, batch) for done in final}
