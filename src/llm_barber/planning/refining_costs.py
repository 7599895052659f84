"""What refining costs: swaps and least squares of a block's linears, tuning of a layer."""

from llm_barber.masking.statistics import gram_flops
from llm_barber.method.refine_linear import DAMPINGS, STEPS_A_DAMPING, UNGUARDED_STEPS
from llm_barber.planning.initial_costs import choose, statistics
from llm_barber.planning.passes import BACKWARD_ATTENTION, FLOAT32, forward, inputs, reduced, streamed
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes
from llm_barber.planning.work import NONE, Work
from llm_barber.settings.refining import SEQUENCES_A_STEP

TUNING = 80  # bytes a weight and step: masked copy, its gradient, Adam
ROW = 256  # a row costs a round of swaps as much as so many weights more


def refine(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """Inputs of the block's linears in the sparse model and the dense one, Gram matrices, swaps, least squares."""
    if recipe.refine is None:
        return NONE
    tokens, streams = recipe.own_tokens, 2 if recipe.follows_dense else 1
    found = forward(block, recipe, recipe.held_out or tokens) * (3 if recipe.refine.of_linears else 4)  # errors
    if recipe.follows_dense:
        found += forward(block, recipe, tokens) + streamed(block, recipe, tokens, 2)
    if recipe.refine.of_linears:  # otherwise they are left to what tunes the layer
        found += inputs(block, recipe, tokens) * streams + forward(block, recipe, tokens, until_last=True)
        read = 2 * streams * (1 if block is layer.blocks[0] else 2)
        found += streamed(block, recipe, tokens, read - 2 * (streams - 1))
        found += improved(block, recipe)
    return found


def improved(block: BlockShapes, recipe: Recipe) -> Work:
    """Gram matrices, swaps and least squares of a block's linears."""
    settings = recipe.refine
    assert settings is not None
    streams = 2 if recipe.follows_dense else 1
    of_a_copy = NONE
    given = recipe.own_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        matrices = streams * (2 if settings.held_out else 1)
        crossed = 2 * given * columns**2 if streams == 2 else 0  # not symmetric
        sums = gram_flops(given, columns) + crossed
        of_a_copy += Work(grams=sums, moved=streams * given * columns * FLOAT32 * 2)
        of_a_copy += reduced(recipe, matrices * FLOAT32 * columns**2)
        for rows, _ in group:
            of_a_copy += _improve(recipe, rows, columns)
    return of_a_copy * block.copies


def _improve(recipe: Recipe, rows: int, columns: int) -> Work:
    """Swaps and least squares of one linear. An error on held-out windows is a product with one matrix or two."""
    assert recipe.refine is not None
    product = 2 * rows * columns**2
    streams = 2 if recipe.follows_dense else 1
    guarded = bool(recipe.refine.held_out)
    count = float(streams - 1)  # the linear term
    stages = len(recipe.swap_stages)
    if stages:
        count += stages + (streams * (1 + stages) if guarded else 0)
    if recipe.refine.solve and guarded:
        count += streams + len(DAMPINGS) * (1 + STEPS_A_DAMPING + streams)
    elif recipe.refine.solve:
        count += 1 + UNGUARDED_STEPS
    searched = recipe.rounds(columns) * rows * (columns + ROW)
    return Work(exact=count * product, searched=searched, moved=4 * FLOAT32 * count * rows * columns)


def tune(layer: LayerShapes, recipe: Recipe) -> Work:
    """Adam: forward and twice as much back for the windows; those held out before and after each pass; the targets.

    The inputs' mean squares before, and for masks a choice of what is kept at every step.
    """
    if recipe.refine is None or not recipe.refine.of_layers:
        return NONE
    passes, held_out = recipe.refine.passes, recipe.held_out
    masks, both = recipe.refine.tunes_masks, recipe.refine.tunes_masks and recipe.refine.tunes_weights
    # A step's sequences are shared by as many processes at most; the others wait for them.
    trained = (recipe.own_tokens - held_out) * max(1, recipe.processes / SEQUENCES_A_STEP)
    found = NONE
    for block in layer.blocks:
        once = forward(block, recipe, trained)
        found += once * passes
        found += Work(
            products=once.products, gradients=once.products, attention=BACKWARD_ATTENTION * once.attention,
            moved=2 * once.moved,
        ) * passes  # fmt: skip
        found += forward(block, recipe, held_out) * (passes + 1)
        found += forward(block, recipe, recipe.own_tokens if recipe.refine.target_mix < 1 else 0)
        found += streamed(block, recipe, recipe.own_tokens, passes + 1)
    a_step = Work(moved=TUNING * layer.weights * (2 if both else 1)) + reduced(
        recipe, max(FLOAT32, 2 * recipe.itemsize) * layer.weights
    )
    for block in layer.blocks:
        found += forward(block, recipe, recipe.own_tokens) + statistics(block, recipe)
        found += choose(block, recipe) * (passes * recipe.tune_steps) if masks else NONE
    return found + a_step * (passes * recipe.tune_steps)
