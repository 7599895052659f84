"""What initial masks cost, and the allocation before them: statistics of the inputs, ranking, updates."""

from llm_barber.masking.sparsegpt import STRIDE
from llm_barber.masking.statistics import gram_flops
from llm_barber.model.architecture import MLP
from llm_barber.planning.passes import BACKWARD_ATTENTION, FLOAT32, SQUARING, forward, reduced, streamed
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NONE, Work, sorting
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation

CHOOSING, COSTING = 60, 40  # bytes a weight, of scores, comparisons and masks
ADMM_STEPS, ADMM_BYTES = 100, 60  # of ALPS: it ends when the mask is settled, after 300 at most
DECOMPOSITION = {Initial.SPARSEGPT: 2, Initial.ALPS: 12}  # FLOPs over in³: Cholesky and inverse; eigenvectors


def allocate(model: ModelShapes, recipe: Recipe) -> Work:
    """By the loss: forward and the head, then back, where every layer is computed again; outliers: forward."""
    if recipe.allocation is Allocation.UNIFORM:
        return NONE
    by_loss = recipe.allocation is Allocation.LOSS
    tokens = recipe.loss_tokens if by_loss else recipe.own_tokens
    found = NONE
    for layer in model.layers:
        size = layer.parameters * recipe.stored
        for block in layer.blocks:
            once = forward(block, recipe, tokens) + streamed(block, recipe, tokens, 1, recipe.allocating)
            if not by_loss:
                found += once * 2 + choose(block, recipe)
                continue
            back = Work(products=once.products, attention=BACKWARD_ATTENTION * once.attention, moved=2 * once.moved)
            found += once * 2 + back + _costing(block, recipe, tokens)
        found += Work(read=size, copied=size) * (2 if by_loss else 1)
    if by_loss:
        logits = tokens * model.vocabulary
        found += Work(
            read=model.outside * recipe.stored,
            copied=model.outside * recipe.itemsize,
            products=4 * logits * model.head,
            moved=logits * (2 * recipe.itemsize + 6 * FLOAT32),
        )
    return found


def _costing(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """The Fisher information's sums, and what pruning each weight costs, in order."""
    found = NONE
    for rows, columns in block.linears:
        found += Work(
            moved=SQUARING * tokens * block.share * (rows + columns) + COSTING * rows * columns,
            ordered=sorting(rows * columns, columns),
        ) + reduced(recipe, FLOAT32 * (rows + columns))
    return found * block.copies


def initial(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """One pass of the dense layer that ends at its last linear's input, a statistic of the inputs, and ranking."""
    found = choose(block, recipe)
    if recipe.initial is Initial.MAGNITUDE:
        return found
    tokens = recipe.own_tokens
    found += forward(block, recipe, tokens, until_last=block is layer.blocks[-1]) + streamed(block, recipe, tokens, 0.5)
    return found + statistics(block, recipe)


def choose(block: BlockShapes, recipe: Recipe) -> Work:
    """Ranking for an initial mask."""
    found = NONE
    for rows, columns in block.linears:
        moved = CHOOSING * rows * columns
        if recipe.pattern is not None:
            found += Work(moved=moved + within_groups(recipe, rows * columns))
            continue
        members = rows * columns if recipe.initial.compares_in_linear else columns
        found += Work(moved=moved, sorted=sorting(rows * columns, members))
    return found * block.copies


def within_groups(recipe: Recipe, weights: float) -> float:
    """Bytes moved to rank weights within groups of M: M(M - 1)/2 comparisons of an Mth of them each, and copies."""
    return 0 if recipe.pattern is None else 8 * recipe.pattern.of * weights


def statistics(block: BlockShapes, recipe: Recipe) -> Work:
    """What the method gathers of the block's inputs, and does with it."""
    of_a_copy = NONE
    given = recipe.own_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        if recipe.initial in DECOMPOSITION:
            of_a_copy += Work(grams=gram_flops(given, columns), exact=DECOMPOSITION[recipe.initial] * columns**3)
            of_a_copy += reduced(recipe, FLOAT32 * columns**2)
        else:
            of_a_copy += Work(moved=SQUARING * given * columns) + reduced(recipe, FLOAT32 * columns)
        for rows, _ in group:
            of_a_copy += _update(recipe, block, rows, columns)
    return of_a_copy * block.copies


def _update(recipe: Recipe, block: BlockShapes, rows: int, columns: int) -> Work:
    """What a method does to one linear beyond a statistic and a ranking."""
    weights = rows * columns
    match recipe.initial:
        case Initial.SPARSEGPT:  # each stride of columns corrects those to come, each column those of its stride
            return Work(exact=weights * columns, moved=3 * FLOAT32 * STRIDE * weights)
        case Initial.ALPS:
            return Work(exact=2 * weights * columns * (ADMM_STEPS + 10), moved=ADMM_BYTES * ADMM_STEPS * weights)
        case Initial.DSNOT if block.name != MLP:  # MLPs keep Wanda's masks
            return Work(ordered=2 * sorting(weights, columns), moved=4 * CHOOSING * weights)
    return NONE
