"""What passes over the calibration tokens cost, of whatever stage: a block's forward, its inputs, streams, sums."""

from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes
from llm_barber.planning.work import Work

FLOAT32 = 4
# How often a number is read or written, by all that is no matrix product: norms, residuals and comparisons for each
# feature of a block's input; rotary embeddings, activations and masks for each output of its first linears.
INPUT_TOUCHES, OUTPUT_TOUCHES = 16, 5
BACKWARD_ATTENTION = 2.5  # five products where the forward has two
SQUARING = 18  # bytes a number, of float copy, square and sum


def forward(block: BlockShapes, recipe: Recipe, tokens: float, until_last: bool = False) -> Work:
    """One pass of a block over some tokens; `until_last`: without its last linear."""
    weights = block.weights - (size_of(block.linears[-1]) if until_last else 0)
    features, first = block.linears[0][1], sum(rows for rows, _ in block.linears[:-1])
    touched = INPUT_TOUCHES * features + OUTPUT_TOUCHES * first
    # Causal: half of all pairs of tokens, in two products.
    attention = 2 * tokens * recipe.tokens * block.attention_width
    given = tokens * block.share * block.copies
    return Work(products=2 * given * weights, attention=attention, moved=given * touched * recipe.itemsize)


def size_of(linear: tuple[int, int]) -> int:
    """Weights of a linear, (out, in)."""
    return linear[0] * linear[1]


def inputs(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """The way to a block's first linears: no matrix product."""
    return Work(moved=INPUT_TOUCHES * tokens * block.linears[0][1] * recipe.itemsize)


def streamed(block: BlockShapes, recipe: Recipe, tokens: float, arrays: float, there: int | None = None) -> Work:
    """Arrays of activations that are read, or written; of those in files half is taken to be either.

    `there`: how many there are at that time, of which some may stay on the device; None: those between layers.
    """
    width = block.linears[-1][0]
    size = arrays * tokens * width * recipe.itemsize * recipe.moved_share(width, there)
    every = recipe.activations(width)
    on_disk = size * (1 - recipe.in_memory(every, width) / every)
    return Work(copied=size, read=on_disk / 2, written=on_disk / 2)


def reduced(recipe: Recipe, size: float) -> Work:
    """A sum over processes, each of which has an array of so many bytes: a ring sends it nearly twice."""
    return Work(reduced=2 * size * (recipe.processes - 1) / recipe.processes)
