"""Work of a pass over the calibration tokens, in any stage: forward, inputs, streams and sums."""

from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes
from llm_barber.planning.work import Work

FLOAT32 = 4
# Times that a CPU reads or writes a number outside matrix products: by norms, residuals and comparisons, for each
# feature of a block's input; by rotary embeddings, activations and masks, for each output of its first linears.
INPUT_TOUCHES, OUTPUT_TOUCHES = 16, 5
# The same on a GPU, where a test counts them: for a feature, by the norm, which is two kernels, and by the residual;
# for an output, by rotary embeddings, if it is one of queries or keys, and by the activation of an MLP.
NORM, RESIDUAL, ROTARY, ACTIVATION = 4, 3, 2, 1.5
# On a GPU: bytes moved by a pass back, for each byte of a pass forward; bytes moved for a number of a block's output by
# a loss that gradients begin with, and by an error that is reported; times that storing reads or writes it.
BACKWARD_MOVED, LOSS, ERROR, STORED = 2, 30, 24, 2
BACKWARD_ATTENTION = 2.5  # times the forward: five products instead of two
SQUARING = 18  # bytes moved for each number of which squares are added up: float copy, square and sum


def forward_work(block: BlockShapes, recipe: Recipe, tokens: float, until_last: bool = False) -> Work:
    """Work of one pass of a block over some tokens; `until_last`: without its last linear."""
    weights = block.weights - (weight_count(block.linears[-1]) if until_last else 0)
    features, first = block.linears[0][1], sum(rows for rows, _ in block.linears[:-1])
    touched = input_touches(recipe) * features + _output_touches(block, recipe, first)
    # Causal: half of all pairs of tokens, in two products.
    attention = 2 * tokens * recipe.tokens * block.attention_width
    routed = tokens * block.share * block.copies
    return Work(products=2 * routed * weights, attention=attention, moved=routed * touched * recipe.itemsize)


def input_touches(recipe: Recipe) -> float:
    """Times that a feature of a block's input is read or written outside matrix products, in a forward pass."""
    return INPUT_TOUCHES if recipe.on_cpu else NORM + RESIDUAL


def _output_touches(block: BlockShapes, recipe: Recipe, outputs: int) -> float:
    """Times that all outputs of a block's first linears, so many for a token, are read or written beside products."""
    if recipe.on_cpu:
        return OUTPUT_TOUCHES * outputs
    # Keys are as wide as values: the outputs are queries, as wide as the attention, and twice the keys.
    return ROTARY * (outputs + block.attention_width) / 2 if block.attention_width else ACTIVATION * outputs


def error_work(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """Work of comparing a block's output with another, and of storing it; a CPU's is part of its passes."""
    moved = 0 if recipe.on_cpu else ERROR + STORED * recipe.itemsize
    return Work(moved=moved * tokens * block.linears[-1][0])


def loss_work(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """Work of a loss of a block's output, and of its gradient by that output; a CPU's is part of its passes."""
    return Work(moved=0 if recipe.on_cpu else LOSS * tokens * block.linears[-1][0])


def backward_bytes(recipe: Recipe, once: Work) -> float:
    """Bytes moved by a pass back; `once`: the pass forward."""
    return (2 if recipe.on_cpu else BACKWARD_MOVED) * once.moved


def weight_count(linear: tuple[int, int]) -> int:
    """Number of weights of a linear of shape (out, in)."""
    return linear[0] * linear[1]


def input_work(block: BlockShapes, recipe: Recipe, tokens: float) -> Work:
    """Work on the way to a block's first linears: no matrix product."""
    return Work(moved=input_touches(recipe) * tokens * block.linears[0][1] * recipe.itemsize)


def streaming_work(
    block: BlockShapes, recipe: Recipe, tokens: float, arrays: float, present: int | None = None
) -> Work:
    """Work of reading or writing arrays of activations.

    Half of the arrays in files are taken to be read, half written.

    Args:
        block: its width is the arrays'.
        recipe: the run.
        tokens: in each array.
        arrays: number of arrays that are read or written.
        present: number of arrays at that time, of which some may stay on the device; None: the arrays between layers.
    """
    width = block.linears[-1][0]
    size = arrays * tokens * width * recipe.itemsize * recipe.moved_share(width, present)
    all_arrays = recipe.activations(width)
    on_disk = size * (1 - recipe.in_memory(all_arrays, width) / all_arrays)
    return Work(copied=size, read=on_disk / 2, written=on_disk / 2)


def reduction_work(recipe: Recipe, size: float) -> Work:
    """Work of adding up an array of `size` bytes over the processes: a ring sends it nearly twice."""
    return Work(reduced=2 * size * (recipe.processes - 1) / recipe.processes)


def input_squares_work(recipe: Recipe, numbers: float) -> Work:
    """Work of adding up squares of so many numbers of inputs; a GPU squares them as it reads them."""
    return Work(moved=numbers * (SQUARING if recipe.on_cpu else recipe.itemsize))


def gradient_squares_work(block: BlockShapes, recipe: Recipe) -> Work:
    """Work of adding up squares of a block's gradients by weights, of all sequences.

    A GPU reads the gradients of some sequences once, and their sum once for all of these; those of experts are copied
    to float32 before, and read one by one. (In float16 all are float32, which is not counted.)
    """
    weights = recipe.local_sequences * block.all_weights
    if recipe.on_cpu or block.copies > 1:
        return Work(moved=SQUARING * weights)
    return Work(moved=(recipe.itemsize + 2 * FLOAT32) * weights)
