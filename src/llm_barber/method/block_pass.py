"""A pass over one block of a layer that is pruned: inputs, output, errors, and streams that move."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import reconstruction_errors
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.settings.refining import RefineSettings


@dataclass(frozen=True)
class BlockPass:
    """A block with what each step on it needs.

    `final_blocks`: the blocks before it, whose kept outputs are replayed. `last`: it is the layer's last block.
    """

    layer: DecoderLayer
    block: Block
    final_blocks: tuple[Block, ...]
    streams: ActivationStreams
    last: bool

    def replays(self, batch: slice, stream: str = "") -> dict[str, Tensor]:
        """Kept outputs of the final blocks, by the path of their output module."""
        return {final.output: self.streams.read(stream + final.output, batch) for final in self.final_blocks}

    def output(self, batch: slice) -> Tensor:
        """The block's output with the layer's present weights, (sequences, tokens, hidden)."""
        return self.layer.block_output(self.block, self.streams.read(HIDDEN, batch), self.replays(batch))

    def inputs(self, names: list[str], batch: slice, stream: str = "") -> dict[str, Tensor]:
        """The inputs of linears with the layer's present weights, (sequences, tokens, in)."""
        hidden, replays = self.streams.read(stream + HIDDEN, batch), self.replays(batch, stream)
        return self.layer.inputs_of(names, hidden, replays, None if self.last else self.block)

    def keep_output(self, windows: Sequence[slice]) -> None:
        """Keep the block's output for the blocks after it, which replay it; the last block has none after it."""
        for batch in () if self.last else windows:
            self.streams.write(self.block.output, batch, self.output(batch))

    def advance_dense(self, batch: slice, measured: bool = False) -> None:
        """Run the block, with dense weights, on the dense stream; the layer's output waits as `DENSE + NEXT`.

        The block's own output is kept for the blocks after it, and where errors are `measured` against it.
        """
        hidden, replays = self.streams.read(DENSE + HIDDEN, batch), self.replays(batch, DENSE)
        if self.last:
            output, following = self.layer.final_output(hidden, self.block, replays)
            self.streams.write(DENSE + NEXT, batch, following)
        else:
            output = self.layer.block_output(self.block, hidden, replays)
        if measured or not self.last:
            self.streams.write(DENSE + self.block.output, batch, output)


def block_passes(layer: DecoderLayer, blocks: Sequence[Block], streams: ActivationStreams) -> Iterator[BlockPass]:
    """Passes over a layer's blocks in turn; each block is final when the next one is asked for."""
    for number, block in enumerate(blocks):
        yield BlockPass(layer, block, tuple(blocks[:number]), streams, last=number == len(blocks) - 1)


def follows_dense(settings: RefineSettings | None) -> bool:
    """Test whether the run needs the dense model's activations beside the pruned model's."""
    return settings is not None and settings.follows_dense


def measured_windows(settings: RefineSettings, streams: ActivationStreams) -> list[slice]:
    """Batches of the windows that errors are means over: the held-out windows, or all if none is held out."""
    training, held_out = streams.split()
    return held_out if settings.held_out else training


def dense_batches(settings: RefineSettings | None, streams: ActivationStreams) -> list[slice]:
    """Batches in which the dense stream moves; none where the run does not follow it.

    Where linears are refined one by one, no batch has both held-out windows and others.
    """
    if settings is None or not follows_dense(settings):
        return []
    training, held_out = streams.split()
    return [*training, *held_out] if settings.of_linears else list(streams.batches())


def propagate(block_pass: BlockPass, measured_from: int | None) -> float | None:
    """Run a final block and keep its output; of the last block, keep the layer's output as `DENSE_OUTPUT`.

    Args:
        block_pass: the block.
        measured_from: the first sequence whose dense output is kept as `DENSE_OUTPUT`; None: there is none.

    Returns:
        The mean reconstruction error over the sequences from `measured_from` on; None without such sequences. NaN if an
        activation is NaN or Inf.
    """
    layer, block, streams = block_pass.layer, block_pass.block, block_pass.streams
    # A GPU is waited for once, after the last batch.
    total, compared = torch.zeros((), dtype=torch.float64, device=streams.device), 0
    finite = torch.ones((), dtype=torch.bool, device=streams.device)
    measured_from = streams.sequences if measured_from is None else measured_from
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), block_pass.replays(batch)
        if block_pass.last:
            output, following = layer.final_output(hidden, block, replays)
        else:
            output = following = layer.block_output(block, hidden, replays)
            streams.write(block.output, batch, output)
        first = max(batch.start, measured_from)
        if first < batch.stop:
            dense_output = streams.read(DENSE_OUTPUT, slice(first, batch.stop))
            total += reconstruction_errors(dense_output, output[first - batch.start :]).double().sum()
            compared += batch.stop - first
        if block_pass.last:
            streams.write(DENSE_OUTPUT, batch, following)  # the dense output is not needed any more
        for end in torch.aminmax(following):
            finite &= torch.isfinite(end)
    error, all_compared, broken = streams.ranks.total(total.item(), compared, not finite)
    if broken:
        return float("nan")
    return error / all_compared if all_compared else None


def measure_candidates(
    block_pass: BlockPass,
    dense_weights: Mapping[str, Tensor],
    candidates: Sequence[Mapping[str, PrunedLinear]],
    windows: Sequence[slice],
    mix: float,
) -> tuple[list[float], list[float]]:
    """Measure a block with each candidate's linears; afterwards it has the last candidate's.

    The block's dense output on these windows is kept as `DENSE_OUTPUT`.

    Returns:
        For each candidate, the mean reconstruction error, and its squared distance from the target, summed over
        windows. The target is the dense block's output on activations of the pruned model (`mix` 0), of the dense model
        (1), or between both.
    """
    layer, streams = block_pass.layer, block_pass.streams
    # By candidate, errors and distances; a GPU is waited for once, after the last batch.
    totals = torch.zeros(2, len(candidates), dtype=torch.float64, device=streams.device)
    for batch in windows:
        layer.set_weights(dense_weights)
        dense_output = block_pass.output(batch)
        streams.write(DENSE_OUTPUT, batch, dense_output)
        target = None
        if mix:
            target = dense_output.float().lerp(streams.read(DENSE + block_pass.block.output, batch).float(), mix)
        for number, linears in enumerate(candidates):
            layer.set_weights({name: linears[name].weight for name in block_pass.block.linears})
            output = block_pass.output(batch)
            error = reconstruction_errors(dense_output, output).double().sum()
            totals[0, number] += error
            totals[1, number] += error if target is None else reconstruction_errors(target, output).double().sum()
    count = sum(batch.stop - batch.start for batch in windows)
    *sums, sequences = streams.ranks.total(*totals.flatten().tolist(), count)
    return [error / sequences for error in sums[: len(candidates)]], sums[len(candidates) :]


def block_errors(
    layer: DecoderLayer,
    blocks: Sequence[Block],
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    windows: Sequence[slice],
    streams: ActivationStreams,
) -> list[float | None]:
    """Mean reconstruction error of each block of a final layer; None: the block has no pruned linears.

    Args:
        layer: has its pruned weights afterwards.
        blocks: of the layer.
        dense: dense weights, (out, in), by linear.
        pruned: final masks and values, by linear.
        windows: batches that the errors are means over.
        streams: the layer's input.
    """
    errors: list[float | None] = []
    layer.set_weights({name: linear.weight for name, linear in pruned.items()})
    for block_pass in block_passes(layer, blocks, streams):
        dense_weights = {name: dense[name] for name in block_pass.block.linears}
        error = None
        if dense_weights:
            (error,), _ = measure_candidates(block_pass, dense_weights, (pruned,), windows, 0.0)
        errors.append(error)
        block_pass.keep_output(windows)
    return errors
