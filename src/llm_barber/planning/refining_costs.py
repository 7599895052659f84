"""Work of refining: swaps and least squares of a block's linears, tuning of a layer."""

from llm_barber.masking.gram import gram_flops
from llm_barber.method.refine_linear import DAMPINGS, STEPS_A_DAMPING, UNGUARDED_STEPS
from llm_barber.planning.initial_costs import RANKING, ranking_work, statistics_work
from llm_barber.planning.passes import (
    BACKWARD_ATTENTION,
    FLOAT32,
    backward_bytes,
    error_work,
    forward_work,
    input_work,
    loss_work,
    reduction_work,
    streaming_work,
)
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes
from llm_barber.planning.work import NO_WORK, Work

# Bytes that a CPU moves for each weight and step: masked copy, its gradient, Adam; twice as many where masks and values
# are tuned.
TUNING = 80
# Bytes that a GPU moves for each weight when tuning begins: for scores, and for changes of values.
SCORES, CHANGES = 250, 320
ADAM = 50  # bytes that a GPU moves for each weight and step: Adam, and the sum of gradients that it uses
BOTH = 120  # … and more where masks and values are tuned
MASKED = 13  # … and to make masks of scores, beside finding borders or ranks
ROW = 256  # weights; a round of swaps costs this many weights a row, beside the row's own


def refining_work(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """Work of refining a block: inputs in both models, Gram matrices, swaps and least squares."""
    if recipe.refine is None:
        return NO_WORK
    tokens, streams = recipe.local_tokens, 2 if recipe.follows_dense else 1
    work = forward_work(block, recipe, recipe.held_out or tokens) * (3 if recipe.refine.of_linears else 4)  # errors
    if recipe.follows_dense:
        work += forward_work(block, recipe, tokens) + streaming_work(block, recipe, tokens, 2)
    if recipe.refine.of_linears:  # otherwise tuning the layer changes them
        work += input_work(block, recipe, tokens) * streams + forward_work(block, recipe, tokens, until_last=True)
        read = 2 * streams * (1 if block is layer.blocks[0] else 2)
        work += streaming_work(block, recipe, tokens, read - 2 * (streams - 1))
        work += linear_refining_work(block, recipe)
    return work


def linear_refining_work(block: BlockShapes, recipe: Recipe) -> Work:
    """Work of Gram matrices, swaps and least squares of a block's linears."""
    settings = recipe.refine
    assert settings is not None
    streams = 2 if recipe.follows_dense else 1
    work = NO_WORK
    routed = recipe.local_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        matrices = streams * (2 if settings.held_out else 1)
        crossed = 2 * routed * columns**2 if streams == 2 else 0  # not symmetric
        sums = gram_flops(routed, columns) + crossed
        work += Work(grams=sums, moved=streams * routed * columns * FLOAT32 * 2)
        work += reduction_work(recipe, matrices * FLOAT32 * columns**2)
        for rows, _ in group:
            work += _linear_work(recipe, rows, columns)
    return work * block.copies


def _linear_work(recipe: Recipe, rows: int, columns: int) -> Work:
    """Work of swaps and least squares of one linear.

    An error on held-out windows is a product with one matrix, or two with two streams.
    """
    assert recipe.refine is not None
    product = 2 * rows * columns**2
    streams = 2 if recipe.follows_dense else 1
    guarded = bool(recipe.refine.held_out)
    count = float(streams - 1)  # products; with two streams one for the linear term
    stages = len(recipe.swap_stages)
    if stages:
        count += stages + (streams * (1 + stages) if guarded else 0)
    if recipe.refine.solve and guarded:
        count += streams + len(DAMPINGS) * (1 + STEPS_A_DAMPING + streams)
    elif recipe.refine.solve:
        count += 1 + UNGUARDED_STEPS
    searched = recipe.rounds(columns) * rows * (columns + ROW)
    return Work(exact=count * product, searched=searched, moved=4 * FLOAT32 * count * rows * columns)


def tuning_work(layer: LayerShapes, recipe: Recipe) -> Work:
    """Work of tuning a layer by Adam.

    First, the inputs' mean squares are gathered, and the targets take a forward. Each pass takes a forward and twice as
    much back; held-out windows are measured before the first pass and after each. Each step chooses masks anew.
    """
    if recipe.refine is None or not recipe.refine.of_layers:
        return NO_WORK
    passes, held_out = recipe.refine.passes, recipe.held_out
    tunes_masks, tunes_weights = recipe.refine.tunes_masks, recipe.refine.tunes_weights
    trained = (recipe.local_tokens - held_out) * recipe.tune_turns
    work = NO_WORK
    for block in layer.blocks:
        once = forward_work(block, recipe, trained)
        work += once * passes
        work += Work(
            products=once.products, gradients=once.products, attention=BACKWARD_ATTENTION * once.attention,
            moved=backward_bytes(recipe, once),
        ) * passes  # fmt: skip
        work += forward_work(block, recipe, held_out) * (passes + 1)
        if not recipe.on_cpu:  # clipped gradients: inputs and gradients are read twice, and written scaled
            features = sum(rows + columns for rows, columns in block.linears) * block.copies * block.share
            work += Work(moved=3 * recipe.itemsize * features * trained * passes)
        if recipe.refine.aims_at_dense_layers and not recipe.target_from_masks:
            work += forward_work(block, recipe, recipe.local_tokens)
        work += streaming_work(block, recipe, recipe.local_tokens, passes + 1)
    for last in layer.blocks[-1:]:
        work += loss_work(last, recipe, passes * trained) + error_work(last, recipe, (passes + 1) * held_out)
    summed = max(FLOAT32, 2 * recipe.itemsize)  # bytes of the sum of gradients
    step = Work(moved=_step_bytes(recipe) * layer.weights) + reduction_work(recipe, summed * layer.weights)
    for block in layer.blocks:
        work += forward_work(block, recipe, recipe.local_tokens, until_last=block is layer.blocks[-1])
        work += statistics_work(block, recipe)
        step += ranking_work(block, recipe, RANKING if recipe.on_cpu else MASKED) if tunes_masks else NO_WORK
    if not recipe.on_cpu:
        # Each sequence's gradients are read; the sum is written, and read before, but for the first of a step.
        sequences, steps = passes * trained / recipe.tokens, passes * recipe.tune_steps
        added = sequences * recipe.itemsize + (2 * sequences - steps) * summed
        work += Work(moved=(added + SCORES * tunes_masks + CHANGES * tunes_weights) * layer.weights)
    return work + step * (passes * recipe.tune_steps)


def _step_bytes(recipe: Recipe) -> float:
    """Bytes moved for each weight in a step of tuning, but for its masks, and on a GPU for sums of gradients."""
    assert recipe.refine is not None
    both = recipe.refine.tunes_masks and recipe.refine.tunes_weights
    if recipe.on_cpu:
        return TUNING * (1 + both)
    return ADAM + BOTH * both
