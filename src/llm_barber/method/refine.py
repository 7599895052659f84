"""Refine a block's linears one by one, on the pruned model's inputs: swaps and least squares.

The linears of a block are taken in the order in which data flows through them: q, k and v, then the output projection
on their pruned output; gate and up, then down. The target of each linear is its dense output, on inputs between those
of the sparse model (`target_mix` 0) and those of the dense model (1). With a mix above 0, a linear makes up for errors
of earlier layers.

Some calibration windows are held out. They decide how many of a row's swaps are kept, how strongly least squares is
damped, and whether the refined block is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llm_barber.masking.gram import TargetMoments
from llm_barber.method.block_pass import BlockPass, dense_batches, measure_candidates, measured_windows
from llm_barber.method.few_tokens import freeze_linears_with_few_tokens
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine_linear import Objective, refine_linear
from llm_barber.model.streams import DENSE, HIDDEN
from llm_barber.settings.refining import RefineSettings

MOMENTS_BYTES = 2**32  # of the moments that are gathered in one pass; a block of many experts takes several passes

InputGroup = tuple[str, ...]  # linears that read one tensor, such as q, k and v


@dataclass(frozen=True)
class Refined:
    """A block's linears after refining.

    `rejected`: on the held-out windows the refined linears were no better; `linears` are then the unrefined ones.
    `error_before`: mean reconstruction error before, on the held-out windows, or on all if none is held out.
    """

    linears: dict[str, PrunedLinear]
    rejected: bool
    error_before: float


def refine_block(
    block_pass: BlockPass, dense: Mapping[str, Tensor], pruned: Mapping[str, PrunedLinear], settings: RefineSettings
) -> Refined:
    """Refine the linears of a block, one after the other.

    For a target mix, the dense stream moves through the block, too.

    Args:
        block_pass: the block, and the layer's activations; for a target mix, the dense model's, too.
        dense: dense weights, (out, in), by linear.
        pruned: masks and values to start from, by linear.
        settings: swaps, least squares, target mix, held-out windows. If they do nothing to linears (but tune layers),
            the block is only measured.
    """
    layer, block, streams = block_pass.layer, block_pass.block, block_pass.streams
    dense_weights = {name: dense[name] for name in block.linears}
    if not settings.of_linears:
        return _measure_unrefined(block_pass, dense_weights, pruned, settings)
    pruned = _freeze_linears_with_few_tokens(block_pass, pruned)
    current = {name: pruned[name].weight for name in block.linears}
    refined: dict[str, PrunedLinear] = {}
    groups = layer.input_groups(block, streams.read(HIDDEN, next(streams.batches())))
    levels = _levels(groups, list(layer.linears))
    chunks = [chunk for level in levels for chunk in _chunks(level, dense_weights)]
    for chunk in chunks:
        last = chunk is chunks[-1]
        linears = _refine_chunk(block_pass, chunk, pruned, current, dense_weights, settings, last)
        refined |= linears
        current |= {name: linear.weight for name, linear in linears.items()}
    return _guard(block_pass, dense_weights, pruned, refined, settings)


def _refine_chunk(
    block_pass: BlockPass,
    chunk: list[InputGroup],
    pruned: Mapping[str, PrunedLinear],
    current: Mapping[str, Tensor],
    dense_weights: Mapping[str, Tensor],
    settings: RefineSettings,
    last: bool,
) -> dict[str, PrunedLinear]:
    """Refine the linears of input groups that do not depend on each other.

    Args:
        block_pass: the block.
        chunk: input groups, the names of the linears of each.
        pruned: masks and values to start from, by linear.
        current: the block's weights so far, (out, in).
        dense_weights: its dense weights, (out, in).
        settings: as in `refine_block`.
        last: as in `_gather_moments`.
    """
    names = [group[0] for group in chunk]
    moments = _gather_moments(block_pass, names, current, dense_weights, settings, last)
    refined = {}
    for group in chunk:
        training, held_out = (Objective.of(windows[group[0]], settings.target_mix) for windows in moments)
        for name in group:
            refined[name] = pruned[name]
            if training is not None and not pruned[name].few_tokens:
                refined[name] = refine_linear(pruned[name], dense_weights[name], training, held_out, settings)
    return refined


def _gather_moments(
    block_pass: BlockPass,
    names: list[str],
    current: Mapping[str, Tensor],
    dense_weights: Mapping[str, Tensor],
    settings: RefineSettings,
    last: bool,
) -> list[dict[str, TargetMoments]]:
    """Moments of linears' inputs, by linear: on the training windows, and on the held-out windows.

    Args:
        block_pass: the block.
        names: of the linears, one of each group that reads one tensor.
        current: the block's weights so far, (out, in).
        dense_weights: its dense weights, (out, in).
        settings: target mix.
        last: no more moments of this block will be gathered, so that the dense stream moves on.
    """
    layer, streams, crossed = block_pass.layer, block_pass.streams, settings.target_mix > 0
    gathered = []
    for batches in streams.split():
        moments = {name: TargetMoments(dense_weights[name].shape[1], streams.device, crossed) for name in names}
        for batch in batches:
            layer.set_weights(current)
            inputs, dense_inputs = block_pass.inputs(names, batch), None
            if crossed:
                layer.set_weights(dense_weights)
                dense_inputs = _dense_inputs(block_pass, names, batch, last)
            for name, of_linear in moments.items():
                of_linear.update(inputs[name], None if dense_inputs is None else dense_inputs[name])
        for name in names:
            streams.ranks.add(moments[name])
        gathered.append(moments)
    return gathered


def _freeze_linears_with_few_tokens(
    block_pass: BlockPass, pruned: Mapping[str, PrunedLinear]
) -> dict[str, PrunedLinear]:
    """Freeze the block's linears of experts with few tokens.

    If tokens are not counted yet, the block is run to count them.
    """
    layer, linears = block_pass.layer, {name: pruned[name] for name in block_pass.block.linears}
    if not any(linear.few_tokens is None and layer.belongs_to_expert(name) for name, linear in linears.items()):
        return linears
    layer.set_weights({name: linear.weight for name, linear in linears.items()})
    layer.forget_tokens()
    for batches in block_pass.streams.split():
        for batch in batches:
            block_pass.output(batch)
    return freeze_linears_with_few_tokens(linears, layer, block_pass.streams.ranks)


def _guard(
    block_pass: BlockPass,
    dense_weights: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    refined: Mapping[str, PrunedLinear],
    settings: RefineSettings,
) -> Refined:
    """Keep the refined block, unless the held-out windows are no nearer to their target with it."""
    windows = measured_windows(settings, block_pass.streams)
    errors, distances = measure_candidates(block_pass, dense_weights, (pruned, refined), windows, settings.target_mix)
    if settings.held_out and not distances[1] < distances[0]:  # NaN is not nearer
        return Refined({name: pruned[name] for name in block_pass.block.linears}, True, errors[0])
    return Refined(dict(refined), False, errors[0])


def _measure_unrefined(
    block_pass: BlockPass,
    dense_weights: Mapping[str, Tensor],
    pruned: Mapping[str, PrunedLinear],
    settings: RefineSettings,
) -> Refined:
    """Measure a block whose linears are left to tuning; the dense stream moves on."""
    windows = measured_windows(settings, block_pass.streams)
    block_pass.layer.set_weights(dense_weights)
    for batch in dense_batches(settings, block_pass.streams):
        block_pass.advance_dense(batch)
    (error,), _ = measure_candidates(block_pass, dense_weights, (pruned,), windows, 0.0)
    return Refined({name: pruned[name] for name in block_pass.block.linears}, False, error)


def _levels(groups: list[InputGroup], linears: list[str]) -> list[list[InputGroup]]:
    """Levels of input groups, in the order of data flow.

    A level has the groups of the same names, one for each expert, in the order of `linears`: processes visit experts in
    other orders, by the tokens that each has, and must add up moments in one order. Groups of a level do not depend on
    each other.
    """
    levels: dict[InputGroup, list[InputGroup]] = {}
    for group in groups:
        levels.setdefault(tuple(name.rpartition(".")[2] for name in group), []).append(group)
    number = {name: index for index, name in enumerate(linears)}
    return [sorted(level, key=lambda group: number[group[0]]) for level in levels.values()]


def _chunks(level: list[InputGroup], dense: Mapping[str, Tensor]) -> Iterator[list[InputGroup]]:
    """Chunks of a level whose moments take at most `MOMENTS_BYTES`; a chunk has one group at least."""
    chunk: list[InputGroup] = []
    size = 0
    for group in level:
        needed = 4 * 4 * dense[group[0]].shape[1] ** 2  # training and held-out windows, two matrices each, float32
        if chunk and size + needed > MOMENTS_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(group)
        size += needed
    yield chunk


def _dense_inputs(block_pass: BlockPass, names: list[str], batch: slice, last: bool) -> dict[str, Tensor]:
    """Inputs of linears in the dense model, (sequences, tokens, in).

    After the `last` inputs of a block, the dense stream moves on.

    Experts are given the same tokens as in the sparse model, so that the inputs of both belong together.
    """
    if last and not block_pass.layer.experts:
        with block_pass.layer.hooks.noted(names, batch.stop - batch.start) as inputs:
            block_pass.advance_dense(batch, measured=True)
        return inputs
    with block_pass.layer.same_routes():
        inputs = block_pass.inputs(names, batch, DENSE)
    if last:
        block_pass.advance_dense(batch, measured=True)
    return inputs
