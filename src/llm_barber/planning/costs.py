"""How much each stage of a run computes, moves, reads and writes: arithmetic on shapes and settings, nothing else.

The passes are those of the code: docs/algorithm.md and docs/refining.md have them. One process's share is counted:
calibration sequences are divided, what every process repeats (ranking, swaps, least squares) is not.
"""

from dataclasses import dataclass, fields, replace

from llm_barber.config import Initial
from llm_barber.masking.granularity import Granularity
from llm_barber.model.architecture import MLP
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NONE, Work, sorting
from llm_barber.presets import Allocation
from llm_barber.refine_linear import DAMPINGS, STEPS_A_DAMPING, UNGUARDED_STEPS

FLOAT32 = 4
# How often a number is read or written, by all that is no matrix product: norms, residuals and comparisons for each
# feature of a block's input; rotary embeddings, activations and masks for each output of its first linears.
INPUT_TOUCHES, OUTPUT_TOUCHES = 16, 5
BACKWARD_ATTENTION = 2.5  # five products where the forward has two
# Bytes a weight: scores, comparisons and masks.
CHOOSING, REBUILDING, COSTING = 60, 150, 40
SQUARING = 18  # bytes a number, of float copy, square and sum
TUNING = 80  # bytes a weight and step: masked copy, its gradient, Adam
ROW = 256  # a row costs a round of swaps as much as so many weights more
ADMM_STEPS, ADMM_BYTES = 100, 60  # of ALPS: it ends when the mask is settled, after 300 at most
DECOMPOSITION = {Initial.SPARSEGPT: 2, Initial.ALPS: 12}  # FLOPs over in³: Cholesky and inverse; eigenvectors


@dataclass(frozen=True)
class Costs:
    """What a process does, by stage; layers by what is done in them."""

    embed: Work = NONE
    allocate: Work = NONE
    initial: Work = NONE
    rebuild: Work = NONE
    refine: Work = NONE
    tune: Work = NONE
    propagate: Work = NONE
    read: Work = NONE
    write: Work = NONE
    head: Work = NONE

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> Work:
        """Of all stages."""
        return sum((getattr(self, one.name) for one in fields(self)), NONE)


def run_costs(model: ModelShapes, recipe: Recipe) -> Costs:
    """What a run costs the process that has the most sequences."""
    head = _prune_head(model, recipe) if recipe.prunes_head else NONE
    found = Costs(embed=_embed(model, recipe), allocate=_allocate(model, recipe), head=head)
    for index, layer in enumerate(model.layers):
        # Nothing starts from its output.
        last = index == len(model.layers) - 1 and not recipe.prunes_head
        size = layer.parameters * recipe.stored
        # Of all processes: the first one keeps it, and is sent what the others have.
        kept = 0 if last else (2 if recipe.follows_dense else 1) * recipe.every_token * model.hidden * recipe.itemsize
        found += Costs(
            initial=sum((_initial(layer, block, recipe) for block in layer.blocks), NONE),
            rebuild=sum((_rebuild(block, recipe) for block in layer.blocks), NONE),
            refine=sum((_refine(layer, block, recipe) for block in layer.blocks), NONE),
            tune=_tune(layer, recipe),
            propagate=_propagate(layer, recipe),
            read=Work(read=size, copied=size),
            write=Work(written=size + kept, copied=size, reduced=kept * (recipe.processes - 1) / recipe.processes),
        )
    return found


def forward(block: BlockShapes, recipe: Recipe, tokens: float, until_last: bool = False) -> Work:
    """One pass of a block over some tokens; `until_last`: without its last linear."""
    weights = block.weights - (_size(block.linears[-1]) if until_last else 0)
    features, first = block.linears[0][1], sum(rows for rows, _ in block.linears[:-1])
    touched = INPUT_TOUCHES * features + OUTPUT_TOUCHES * first
    # Causal: half of all pairs of tokens, in two products.
    attention = 2 * tokens * recipe.tokens * block.attention_width
    given = tokens * block.share * block.copies
    return Work(products=2 * given * weights, attention=attention, moved=given * touched * recipe.itemsize)


def _size(linear: tuple[int, int]) -> int:
    return linear[0] * linear[1]


def _inputs(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """The way to a block's first linears: no matrix product."""
    return Work(moved=INPUT_TOUCHES * tokens * block.linears[0][1] * recipe.itemsize)


def _streams(block: BlockShapes, recipe: Recipe, tokens: float, arrays: float) -> Work:
    """Arrays of activations read from host memory, or written; of those in files half is taken to be either."""
    width = block.linears[-1][0]
    size = arrays * tokens * width * recipe.itemsize
    every = recipe.activations(width)
    on_disk = size * (1 - recipe.in_memory(every, width) / every)
    return Work(copied=size, read=on_disk / 2, written=on_disk / 2)


def _reduce(recipe: Recipe, size: float) -> Work:
    """A sum over processes, each of which has an array of so many bytes: a ring sends it nearly twice."""
    return Work(reduced=2 * size * (recipe.processes - 1) / recipe.processes)


def _embed(model: ModelShapes, recipe: Recipe) -> Work:
    outside = model.outside * recipe.stored
    hidden = recipe.own_tokens * model.hidden * recipe.itemsize
    return Work(read=outside, written=outside, copied=model.embedding * recipe.itemsize + hidden, moved=2 * hidden)


def _allocate(model: ModelShapes, recipe: Recipe) -> Work:
    """By the loss: forward and the head, then back, where every layer is computed again; outliers: forward."""
    if recipe.allocation is Allocation.UNIFORM:
        return NONE
    by_loss = recipe.allocation is Allocation.LOSS
    tokens = recipe.loss_tokens if by_loss else recipe.own_tokens
    found = NONE
    for layer in model.layers:
        size = layer.parameters * recipe.stored
        for block in layer.blocks:
            once = forward(block, recipe, tokens) + _streams(block, recipe, tokens, 1)
            if not by_loss:
                found += once * 2 + _choose(block, recipe)
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
        ) + _reduce(recipe, FLOAT32 * (rows + columns))
    return found * block.copies


def _choose(block: BlockShapes, recipe: Recipe) -> Work:
    """Ranking for an initial mask."""
    found = NONE
    for rows, columns in block.linears:
        moved = CHOOSING * rows * columns
        if recipe.pattern is not None:
            found += Work(moved=moved + _within_groups(recipe, rows * columns))
            continue
        by_linear = recipe.initial in (Initial.MAGNITUDE, Initial.RIA, Initial.ALPS)
        found += Work(moved=moved, sorted=sorting(rows * columns, rows * columns if by_linear else columns))
    return found * block.copies


def _within_groups(recipe: Recipe, weights: float) -> float:
    """Bytes moved to rank weights within groups of M: M comparisons with all."""
    return 0 if recipe.pattern is None else 8 * recipe.pattern.of * weights


def _initial(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """One pass of the dense layer that ends at its last linear's input, a statistic of the inputs, and ranking."""
    found = _choose(block, recipe)
    if recipe.initial is Initial.MAGNITUDE:
        return found
    tokens = recipe.own_tokens
    found += forward(block, recipe, tokens, until_last=block is layer.blocks[-1]) + _streams(block, recipe, tokens, 0.5)
    return found + _statistics(block, recipe)


def _statistics(block: BlockShapes, recipe: Recipe) -> Work:
    """What the method gathers of the block's inputs, and does with it."""
    of_a_copy = NONE
    given = recipe.own_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        if recipe.initial in DECOMPOSITION:
            of_a_copy += Work(grams=2 * given * columns**2, exact=DECOMPOSITION[recipe.initial] * columns**3)
            of_a_copy += _reduce(recipe, FLOAT32 * columns**2)
        else:
            of_a_copy += Work(moved=SQUARING * given * columns) + _reduce(recipe, FLOAT32 * columns)
        for rows, _ in group:
            of_a_copy += _update(recipe, block, rows, columns)
    return of_a_copy * block.copies


def _update(recipe: Recipe, block: BlockShapes, rows: int, columns: int) -> Work:
    """What a method does to one linear beyond a statistic and a ranking."""
    weights = rows * columns
    match recipe.initial:
        case Initial.SPARSEGPT:  # each block of columns corrects those to come, each column those of its block
            return Work(exact=weights * columns, moved=3 * FLOAT32 * 128 * weights)
        case Initial.ALPS:
            return Work(exact=2 * weights * columns * (ADMM_STEPS + 10), moved=ADMM_BYTES * ADMM_STEPS * weights)
        case Initial.DSNOT if block.name != MLP:  # MLPs keep Wanda's masks
            return Work(ordered=2 * sorting(weights, columns), moved=4 * CHOOSING * weights)
    return NONE


def _rebuild(block: BlockShapes, recipe: Recipe) -> Work:
    """y_sparse; y_dense, back to the block's first linears; every sequence's gradients of weights; ranking."""
    if recipe.granularity is None:
        return NONE
    tokens = recipe.own_tokens
    once = forward(block, recipe, tokens)
    first = sum(_size(linear) for linear in block.linears[:-1])
    given, weights = tokens * block.share * block.copies, block.every_weight
    back = Work(
        products=2 * given * (block.weights - first),
        gradients=2 * given * block.weights,
        attention=BACKWARD_ATTENTION * once.attention,
        moved=once.moved + recipe.own_sequences * weights * SQUARING,
    )
    together = {
        Granularity.OUTPUT: block.linears[0][1], Granularity.INPUT: block.linears[0][0],
        Granularity.LINEAR: block.largest, Granularity.BLOCK: weights + block.beside,
    }[recipe.granularity]  # fmt: skip
    ranking = Work(
        moved=REBUILDING * weights + 2 * _within_groups(recipe, weights), sorted=2 * sorting(weights, together)
    )
    moved = _streams(block, recipe, tokens, 3)
    return once * 2 + back + ranking + moved + _reduce(recipe, FLOAT32 * weights)


def _refine(layer: LayerShapes, block: BlockShapes, recipe: Recipe) -> Work:
    """Inputs of the block's linears in the sparse model and the dense one, Gram matrices, swaps, least squares."""
    if recipe.refine is None:
        return NONE
    tokens, streams = recipe.own_tokens, 2 if recipe.follows_dense else 1
    found = forward(block, recipe, recipe.held_out or tokens) * (3 if recipe.refine.of_linears else 4)  # errors
    if recipe.follows_dense:
        found += forward(block, recipe, tokens) + _streams(block, recipe, tokens, 2)
    if recipe.refine.of_linears:  # otherwise they are left to what tunes the layer
        found += _inputs(block, recipe, tokens) * streams + forward(block, recipe, tokens, until_last=True)
        read = 2 * streams * (1 if block is layer.blocks[0] else 2)
        found += _streams(block, recipe, tokens, read - 2 * (streams - 1))
        found += _improved(block, recipe)
    return found


def _improved(block: BlockShapes, recipe: Recipe) -> Work:
    """Gram matrices, swaps and least squares of a block's linears."""
    settings = recipe.refine
    assert settings is not None
    streams = 2 if recipe.follows_dense else 1
    of_a_copy = NONE
    given = recipe.own_tokens * block.share
    for group in block.groups:
        columns = group[0][1]
        matrices = streams * (2 if settings.held_out else 1)
        of_a_copy += Work(grams=2 * given * columns**2 * streams, moved=streams * given * columns * FLOAT32 * 2)
        of_a_copy += _reduce(recipe, matrices * FLOAT32 * columns**2)
        for rows, _ in group:
            of_a_copy += _improve(recipe, rows, columns)
    return of_a_copy * block.copies


def _prune_head(model: ModelShapes, recipe: Recipe) -> Work:
    """The output head on the last layer's output; written, where it had no weights of its own."""
    block, tokens = model.head_block, recipe.own_tokens
    found = _choose(block, recipe)
    passes = 0
    if recipe.initial is not Initial.MAGNITUDE:
        found += _statistics(block, recipe)
        passes += 1
    if recipe.refine is not None:
        found += _improved(block, replace(recipe, refine=recipe.refine.of_head))
        passes += 2 if recipe.follows_dense else 1
    hidden = tokens * model.hidden * recipe.itemsize
    return found + Work(
        read=model.outside * recipe.stored,
        written=block.weights * recipe.stored if model.tied else 0,
        copied=model.outside * recipe.itemsize + passes * hidden,
        moved=passes * INPUT_TOUCHES * hidden,
    )


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


def _tune(layer: LayerShapes, recipe: Recipe) -> Work:
    """Adam: forward and twice as much back for the windows, forward for those held out, most passes; the targets.

    The inputs' mean squares before, and for masks a choice of what is kept at every step.
    """
    if recipe.refine is None or not recipe.refine.of_layers:
        return NONE
    passes, held_out = recipe.refine.passes, recipe.held_out
    masks, both = recipe.refine.tunes_masks, recipe.refine.tunes_masks and recipe.refine.tunes_weights
    trained = recipe.own_tokens - held_out
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
        found += _streams(block, recipe, recipe.own_tokens, passes + 1)
    a_step = Work(moved=TUNING * layer.weights * (2 if both else 1)) + _reduce(
        recipe, max(FLOAT32, 2 * recipe.itemsize) * layer.weights
    )
    for block in layer.blocks:
        found += forward(block, recipe, recipe.own_tokens) + _statistics(block, recipe)
        found += _choose(block, recipe) * (passes * recipe.tune_steps) if masks else NONE
    return found + a_step * (passes * recipe.tune_steps)


def _propagate(layer: LayerShapes, recipe: Recipe) -> Work:
    """The final blocks; attention once more where tuning changed it after it had been run."""
    found = NONE
    for block in layer.blocks:
        changed = recipe.refine is not None and (recipe.refine.of_linears or recipe.granularity is not None)
        again = changed and recipe.refine is not None and recipe.refine.of_layers and block is layer.blocks[0]
        once = forward(block, recipe, recipe.own_tokens) + _streams(block, recipe, recipe.own_tokens, 2.5)
        found += once * (2 if again else 1)
    return found
