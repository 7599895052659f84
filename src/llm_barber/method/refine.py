"""Refine a block's masks and weights: exact swaps and least squares, on the inputs that its pruned predecessors give.

The linears of a block are taken in the order in which data flows through them: q, k and v, then the output projection
on their pruned output; gate and up, then down. Each one's target is its dense output, on inputs that lie between those
of the sparse model (`target_mix` 0) and those of the dense model (1): then it makes up for errors of earlier layers.

Some calibration windows are held out: they decide how many of a row's swaps are kept, how strongly least squares is
damped, and whether the block is better for it all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llm_barber.masking.statistics import TargetMoments
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine_linear import Objective, refine_linear
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import reconstruction_errors
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.settings.refining import RefineSettings

MOMENTS_BYTES = 2**32  # of experts' moments at a time


@dataclass(frozen=True)
class Refined:
    """A block's linears; whether held-out windows rejected the change.

    `errors`: mean reconstruction errors before and after, on the windows that are held out, if any are, or on all.
    """

    linears: dict[str, PrunedLinear]
    rejected: bool
    errors: tuple[float, float]


@dataclass(frozen=True)
class Pass:
    """What every step on a block needs: the layer, the block, the final ones before it, and the activations."""

    layer: DecoderLayer
    block: Block
    final: list[Block]
    streams: ActivationStreams
    last: bool  # of the layer

    def replays(self, batch: slice, stream: str = "") -> dict[str, Tensor]:
        """Kept outputs of the final blocks."""
        return {done.output: self.streams.read(stream + done.output, batch) for done in self.final}

    def output(self, batch: slice) -> Tensor:
        """The block's output with the layer's present weights, (sequences, tokens, hidden)."""
        return self.layer.block_output(self.block, self.streams.read(HIDDEN, batch), self.replays(batch))

    def inputs(self, names: list[str], batch: slice, stream: str = "") -> dict[str, Tensor]:
        """The inputs of linears with the layer's present weights, (sequences, tokens, in)."""
        hidden, replays = self.streams.read(stream + HIDDEN, batch), self.replays(batch, stream)
        return self.layer.inputs_of(names, hidden, replays, None if self.last else self.block)

    def advance_dense(self, batch: slice, measured: bool = False) -> None:
        """Run the block, with dense weights, on the dense stream; the layer's output waits as `DENSE + NEXT`.

        The block's own is kept for the blocks after it, and where it is going to be `measured` against.
        """
        hidden, replays = self.streams.read(DENSE + HIDDEN, batch), self.replays(batch, DENSE)
        if self.last:
            output, following = self.layer.final_output(hidden, self.block, replays)
            self.streams.write(DENSE + NEXT, batch, following)
        else:
            output = self.layer.block_output(self.block, hidden, replays)
        if measured or not self.last:
            self.streams.write(DENSE + self.block.output, batch, output)


def refine_block(
    work: Pass, dense: Mapping[str, Tensor], pruned: Mapping[str, PrunedLinear], settings: RefineSettings
) -> Refined:
    """Refine the linears of a block, one after the other; for a target mix, move the dense stream through it, too.

    Args:
        work: the block, and the layer's activations; of the dense model, too, for a target mix.
        dense: dense weights, (out, in), by linear.
        pruned: what to start from, by linear.
        settings: how.
    """
    layer, block, streams = work.layer, work.block, work.streams
    dense_weights = {name: dense[name] for name in block.linears}
    if not settings.of_linears:
        return _measured(work, dense_weights, pruned, settings)
    pruned = _freeze_linears_with_few_tokens(work, pruned)
    current = {name: pruned[name].weight for name in block.linears}
    training, held_out = streams.split()
    refined: dict[str, PrunedLinear] = {}
    groups = layer.input_groups(block, streams.read(HIDDEN, next(streams.batches())))
    steps = [step for level in _levels(groups) for step in _fitting(level, dense)]
    for step in steps:
        names = [group[0] for group in step]
        moments = []
        for batches in (training, held_out):
            found = {
                name: TargetMoments(dense[name].shape[1], streams.device, crossed=settings.target_mix > 0)
                for name in names
            }
            for batch in batches:
                layer.set_weights(current)
                inputs, others = work.inputs(names, batch), None
                if settings.target_mix:
                    layer.set_weights(dense_weights)
                    others = _dense_inputs(work, names, batch, step is steps[-1])
                for name, one in found.items():
                    one.update(inputs[name], None if others is None else others[name])
            for one in found.values():
                streams.ranks.add(one)
            moments.append(found)
        for group in step:
            training_error, held_out_error = (
                Objective.of(found[group[0]], settings.target_mix) if found[group[0]].tokens else None
                for found in moments
            )
            for name in group:
                if pruned[name].few_tokens:
                    refined[name] = pruned[name]
                    continue
                refined[name] = refine_linear(pruned[name], dense[name], training_error, held_out_error, settings)
                current[name] = refined[name].weight
    return _guarded(work, dense_weights, pruned, refined, settings)


def _freeze_linears_with_few_tokens(work: Pass, pruned: Mapping[str, PrunedLinear]) -> dict[str, PrunedLinear]:
    """The block's linears; where no tokens were counted yet, it is run for that."""
    layer, found = work.layer, {name: pruned[name] for name in work.block.linears}
    if not any(one.few_tokens is None and layer.belongs_to_expert(name) for name, one in found.items()):
        return found
    layer.set_weights({name: one.weight for name, one in found.items()})
    layer.forget_tokens()
    for batches in work.streams.split():
        for batch in batches:
            work.output(batch)
    return freeze_linears_with_few_tokens(found, layer, work.streams.ranks)


def _guarded(
    work: Pass,
    dense_weights: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    refined: Mapping[str, PrunedLinear],
    settings: RefineSettings,
) -> Refined:
    """A block as it was refined, or, if held-out windows are no nearer to the target with that, as it was."""
    windows = measured_windows(settings, work.streams)
    errors, distances = _measure(work, dense_weights, (pruned, refined), windows, settings.target_mix)
    if settings.held_out and not distances[1] < distances[0]:  # NaN is not nearer
        kept = {name: pruned[name] for name in work.block.linears}
        return Refined(kept, True, (errors[0], errors[0]))
    return Refined(dict(refined), False, (errors[0], errors[1]))


def _measured(
    work: Pass, dense_weights: Mapping[str, Tensor], pruned: Mapping[str, PrunedLinear], settings: RefineSettings
) -> Refined:
    """A block whose linears are left to what tunes the layer: its error; the dense stream moves on."""
    streams = work.streams
    work.layer.set_weights(dense_weights)
    for batch in dense_batches(settings, streams):
        work.advance_dense(batch)
    ((error,), _) = _measure(work, dense_weights, (pruned,), measured_windows(settings, streams), 0.0)
    kept = {name: pruned[name] for name in work.block.linears}
    return Refined(kept, False, (error, error))


def measured_windows(settings: RefineSettings, streams: ActivationStreams) -> list[slice]:
    """Those that errors are means over: the ones that are held out, or all."""
    training, held_out = streams.split()
    return held_out if settings.held_out else training


def dense_batches(settings: RefineSettings | None, streams: ActivationStreams) -> list[slice]:
    """Those in which the dense stream moves: where linears are refined, held-out windows are apart from others.

    None, where it is not followed.
    """
    if settings is None or not settings.target_mix:
        return []
    training, held_out = streams.split()
    return [*training, *held_out] if settings.of_linears else list(streams.batches())


def block_errors(
    layer: DecoderLayer,
    blocks: Sequence[Block],
    dense: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    windows: list[slice],
    streams: ActivationStreams,
) -> list[float | None]:
    """The mean reconstruction error of each block of a final layer, behind the others; None: it has no linears.

    Over some windows, as `measured_windows` says. The layer has its pruned weights then.
    """
    found: list[float | None] = []
    layer.set_weights({name: one.weight for name, one in pruned.items()})
    final: list[Block] = []
    for block in blocks:
        work = Pass(layer, block, final, streams, last=block is blocks[-1])
        own = {name: dense[name] for name in block.linears}
        found.append(_measure(work, own, (pruned,), windows, 0.0)[0][0] if own else None)
        for batch in () if work.last else windows:
            streams.write(block.output, batch, work.output(batch))
        final.append(block)
    return found


def _levels(groups: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Groups of linears that do not depend on each other, in order: those of the same names, one for each expert."""
    levels: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for group in groups:
        levels.setdefault(tuple(name.rpartition(".")[2] for name in group), []).append(group)
    return list(levels.values())


def _fitting(level: list[tuple[str, ...]], dense: Mapping[str, Tensor]) -> Iterator[list[tuple[str, ...]]]:
    """As many groups at a time as their moments leave memory for."""
    step: list[tuple[str, ...]] = []
    size = 0
    for group in level:
        needed = 4 * 4 * dense[group[0]].shape[1] ** 2  # of training and held-out windows, two of each, float32
        if step and size + needed > MOMENTS_BYTES:
            yield step
            step, size = [], 0
        step.append(group)
        size += needed
    yield step


def _dense_inputs(work: Pass, names: list[str], batch: slice, last: bool) -> dict[str, Tensor]:
    """The inputs of linears of the dense model, (sequences, tokens, in); with the last ones, its stream moves on.

    Experts are given the tokens that the sparse model's are, so that inputs belong together.
    """
    if last and not work.layer.experts:
        with work.layer.hooks.noted(names, batch.stop - batch.start) as found:
            work.advance_dense(batch, measured=True)
        return found
    with work.layer.same_routes():
        found = work.inputs(names, batch, DENSE)
    if last:
        work.advance_dense(batch, measured=True)
    return found


def _measure(
    work: Pass,
    dense_weights: Mapping[str, Tensor],
    candidates: Sequence[Mapping[str, PrunedLinear]],
    batches: list[slice],
    mix: float,
) -> tuple[list[float], list[float]]:
    """Mean errors of a block with sets of linears, the last of which it has then, and how far they are from the target.

    The dense output is kept for these windows.
    """
    errors, distances = [0.0] * len(candidates), [0.0] * len(candidates)
    for batch in batches:
        work.layer.set_weights(dense_weights)
        output = work.output(batch)
        work.streams.write(DENSE_OUTPUT, batch, output)
        target = output.float()
        if mix:
            target = target.lerp(work.streams.read(DENSE + work.block.output, batch).float(), mix)
        for place, linears in enumerate(candidates):
            work.layer.set_weights({name: linears[name].weight for name in work.block.linears})
            found = work.output(batch)
            errors[place] += reconstruction_errors(output, found).double().sum().item()
            distances[place] += reconstruction_errors(target, found).double().sum().item()
    count = sum(batch.stop - batch.start for batch in batches)
    *sums, sequences = work.streams.ranks.total(*errors, *distances, count)
    return [one / sequences for one in sums[: len(errors)]], sums[len(errors) :]
