"""Work of initial masks and of what comes before them: the order of channels, and the allocation."""

from llm_barber.masking.channel_order import ROWS, TOGETHER
from llm_barber.masking.gram import gram_flops
from llm_barber.masking.selection import SELECTED_ON_GPU
from llm_barber.masking.sparsegpt import STRIDE
from llm_barber.model.architecture import MLP
from llm_barber.native.borders import can_select
from llm_barber.planning.passes import (
    BACKWARD_ATTENTION,
    FLOAT32,
    SQUARING,
    backward_bytes,
    forward_work,
    input_squares_work,
    reduction_work,
    streaming_work,
)
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NO_WORK, Work, sorting_work
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation

# Bytes moved for each weight (scores, comparisons and masks): by ranking, and by the costs of removal.
RANKING, REMOVAL_COSTS = 60, 40
# Bytes moved for each weight to select the border of its row on a GPU, which reads a row 16 times, mostly from caches.
SELECTING = 32
# … and bytes that a CPU moves in the time in which it selects borders, of rows or of linears (`native/borders.c`).
SELECTING_BY_C = 16
COMPARED, COPIED = 21, 20  # bytes moved to rank within groups: for two weights that are compared, for each weight
ADMM_STEPS, ADMM_BYTES = 100, 60  # of ALPS, which ends when the mask has settled, after 300 steps at most
DECOMPOSITION = {Initial.SPARSEGPT: 2, Initial.ALPS: 12}  # FLOPs over in³: Cholesky and inverse; eigenvectors


def allocation_work(model: ModelShapes, recipe: Recipe) -> Work:
    """Work of spreading the sparsity over the linears.

    By the loss: forward through the layers and the head, then back, where each layer is computed again. By outliers:
    forward.
    """
    if recipe.allocation is Allocation.UNIFORM:
        return NO_WORK
    by_loss = recipe.allocation is Allocation.LOSS
    tokens = recipe.loss_tokens if by_loss else recipe.local_tokens
    total, all_layers = NO_WORK, model.layer_parameters * recipe.stored
    reread = 1 - recipe.kept_on_device(all_layers, model.hidden) / all_layers if by_loss else 0
    for layer in model.layers:
        size = layer.parameters * recipe.stored
        for block in layer.blocks:
            once = forward_work(block, recipe, tokens) + streaming_work(block, recipe, tokens, 1, recipe.passing)
            if not by_loss:
                total += once + ranking_work(block, recipe) + _squares_work(block, recipe)
                continue
            moved = backward_bytes(recipe, once)
            back = Work(products=once.products, attention=BACKWARD_ATTENTION * once.attention, moved=moved)
            total += once * 2 + back + _removal_cost_work(block, recipe, tokens)
        total += Work(read=size, copied=size) * (1 + reread)
    if by_loss:
        logits = tokens * model.vocabulary
        head_is_read = recipe.prunes_head and not model.tied  # other parameters outside the layers are at hand
        total += Work(
            read=model.head_block.weights * recipe.stored if head_is_read else 0,
            copied=model.outside * recipe.itemsize,
            products=4 * logits * model.head,
            moved=logits * (2 * recipe.itemsize + 6 * FLOAT32),
        )
    return total


def reordering_work(model: ModelShapes, recipe: Recipe) -> Work:
    """Work of looking for an order of channels: forward through the layers, and assignments for each block's reader.

    The assignments of MLPs are counted: those of heads are small. The host's part of them, some milliseconds for 256
    groups, is not.
    """
    if not recipe.reorders:
        return NO_WORK
    total = NO_WORK
    for layer in model.layers:
        size = layer.parameters * recipe.stored
        for block in layer.blocks:
            rows, columns = block.linears[-1] if block.linears else (0, 0)
            compared = columns * TOGETHER * min(ROWS, rows) if block.name == MLP else 0
            total += forward_work(block, recipe, recipe.local_tokens) + Work(moved=3 * FLOAT32 * compared)
            total += input_squares_work(recipe, recipe.local_tokens * block.share * columns)
            total += streaming_work(block, recipe, recipe.local_tokens, 1, recipe.passing)
        total += Work(read=size, copied=size)
    return total


def _removal_cost_work(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """Work of the Fisher information's sums, and of sorting the weights by what their removal costs."""
    total = NO_WORK
    for rows, columns in block.linears:
        total += Work(
            moved=SQUARING * tokens * block.share * (rows + columns) + REMOVAL_COSTS * rows * columns,
            sorted=sorting_work(rows * columns, columns),
        ) + reduction_work(recipe, FLOAT32 * (rows + columns))
    return total * block.copies


def _squares_work(block: BlockShapes, recipe: Recipe) -> Work:
    """Work of adding up squares of the inputs of a block's linears; linears that read one tensor share them."""
    columns = sum(group[0][1] for group in block.groups)
    return input_squares_work(recipe, recipe.local_tokens * block.share * columns) * block.copies


def initial_mask_work(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """Work of a block's initial mask: a pass of the dense block, a statistic of the inputs, and ranking.

    The layer's last block is computed up to the input of its last linear, unless tuning needs its output.
    """
    work = ranking_work(block, recipe)
    if not recipe.method.reads_inputs:
        return work
    tokens = recipe.local_tokens
    needs_output = recipe.target_from_masks
    work += forward_work(block, recipe, tokens, until_last=block is layer.blocks[-1] and not needs_output)
    work += streaming_work(block, recipe, tokens, 1 if needs_output else 0.5)
    return work + statistics_work(block, recipe)


def ranking_work(block: BlockShapes, recipe: Recipe, moved_beside: float = RANKING) -> Work:
    """Work of ranking a block's weights for a mask.

    `moved_beside`: bytes moved for each weight beside finding borders or ranks.
    """
    work = NO_WORK
    for rows, columns in block.linears:
        moved = moved_beside * rows * columns
        if recipe.pattern is not None:
            work += Work(moved=moved + group_ranking_bytes(recipe, rows * columns))
            continue
        if recipe.on_cpu and can_select():
            work += Work(moved=moved + SELECTING_BY_C * rows * columns)
            continue
        if not recipe.on_cpu and not recipe.ranks_linears and rows >= SELECTED_ON_GPU:
            work += Work(moved=moved + SELECTING * rows * columns)
            continue
        group_size = rows * columns if recipe.ranks_linears else columns
        work += Work(moved=moved, sorted=sorting_work(rows * columns, group_size))
    return work * block.copies


def group_ranking_bytes(recipe: Recipe, weights: float) -> float:
    """Bytes moved to rank weights within groups of M.

    M(M - 1)/2 comparisons, of an Mth of the weights each, and copies.
    """
    return 0 if recipe.pattern is None else (COMPARED * (recipe.pattern.of - 1) / 2 + COPIED) * weights


def statistics_work(block: BlockShapes, recipe: Recipe) -> Work:
    """Work of gathering the method's statistic of the block's inputs, and of using it."""
    work = NO_WORK
    routed = recipe.local_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        if recipe.method in DECOMPOSITION:
            work += Work(grams=gram_flops(routed, columns), exact=DECOMPOSITION[recipe.method] * columns**3)
            work += reduction_work(recipe, FLOAT32 * columns**2)
        else:
            # DSnoT's mean and variance take several passes over the inputs on a GPU, too.
            moments = recipe.method is Initial.DSNOT
            work += Work(moved=SQUARING * routed * columns) if moments else input_squares_work(recipe, routed * columns)
            work += reduction_work(recipe, FLOAT32 * columns)
        for rows, _ in group:
            work += _update_work(recipe, block, rows, columns)
    return work * block.copies


def _update_work(recipe: Recipe, block: BlockShapes, rows: int, columns: int) -> Work:
    """Work of a method on one linear beyond a statistic and a ranking."""
    weights = rows * columns
    match recipe.method:
        case Initial.SPARSEGPT:  # a stride of columns corrects all later columns, a column those of its stride
            return Work(exact=weights * columns, moved=3 * FLOAT32 * STRIDE * weights)
        case Initial.ALPS:
            return Work(exact=2 * weights * columns * (ADMM_STEPS + 10), moved=ADMM_BYTES * ADMM_STEPS * weights)
        case Initial.DSNOT if block.name != MLP:  # MLPs keep Wanda's masks
            return Work(ordered=2 * sorting_work(weights, columns), moved=4 * RANKING * weights)
    return NO_WORK
