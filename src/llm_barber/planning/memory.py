"""The most memory that a run holds at once, in host and on device: arithmetic on shapes and settings.

Each function names a moment at which much is alive, as the code stands: what Python still holds of the layer before is
counted, and pages of the file that is being read.
"""

from dataclasses import dataclass, replace

from llm_barber.loading.job import OUTSIDE_SHARD_BYTES
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.swaps import WEIGHTS_AT_ONCE, WEIGHTS_ON_GPU
from llm_barber.method.allocation import LOGITS
from llm_barber.method.refine import MOMENTS_BYTES
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation

FLOAT32, BOOL = 4, 1
INPUT_ARRAYS, OUTPUT_ARRAYS = 10, 4  # of a batch: float32 ones of the block's input, what autograd keeps of outputs
RANKING = 24  # bytes a weight: two score arrays, both sorted, and masks
SWAPPING = 15  # float32 arrays of the rows that are swapped together
ERROR_ARRAYS = 6  # float32 ones of a linear, when its error is computed
SOLVING = 10  # float32 ones of a linear, in least squares
ORDERING = 24  # bytes a weight: its cost, sorted, and the order, on a GPU; half of that on CPUs
# Of methods that gather Gram matrices, float32 copies of one and of its linear, while weights are updated.
UPDATING = {Initial.SPARSEGPT: (4, 5), Initial.ALPS: (5, 8)}
OF_A_LOGIT = 4  # float32 copies: itself, its logarithm, their gradients


@dataclass(frozen=True)
class Footprint:
    """Bytes in host memory and on the device."""

    host: float = 0
    device: float = 0

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.host + other.host, self.device + other.device)


def peak_footprint(model: ModelShapes, recipe: Recipe) -> Footprint:
    """The peak of each, of one process, without the bare process; on a CPU all is in host memory."""
    moments = [*_embedding(model, recipe), _reading(model, recipe)]
    if recipe.allocation is not Allocation.UNIFORM:
        moments += _allocating(model, recipe)
    streams = _streams(model, recipe)
    for layer in dict.fromkeys(model.layers):
        resident = streams + _layer(layer, recipe)
        moments += [resident + moment for moment in _pruning(layer, recipe)]
    if recipe.prunes_head:
        head, outside = model.head_block, Footprint(device=model.outside * _converted(recipe))
        own = Footprint(device=head.weights * (2 * recipe.stored + BOOL))
        working = Footprint()
        if recipe.refine is not None:
            working = _refining(head, replace(recipe, refine=recipe.refine.of_head))
        moments.append(streams + outside + own + max(working, Footprint(device=RANKING * head.weights), key=_device))
    if recipe.on_cpu:
        return Footprint(host=max(one.host + one.device for one in moments))
    return Footprint(max(one.host for one in moments), max(one.device for one in moments))


def _pruning(layer: LayerShapes, recipe: Recipe) -> list[Footprint]:
    """What is held besides the layer while its masks are chosen, rebuilt, refined and tuned."""
    moments = [Footprint(device=RANKING * max((block.largest for block in layer.blocks), default=0))]
    if recipe.initial in UPDATING and layer.blocks:
        moments.append(_updating(layer, recipe))
    for block in layer.blocks:
        moments.append(Footprint(device=_batch(block, recipe)))
        if recipe.granularity is not None:
            moments.append(_rebuilding(block, recipe))
        if recipe.refine is not None and recipe.refine.of_linears:
            moments.append(_refining(block, recipe))
    if recipe.refine is not None and recipe.refine.of_layers and layer.blocks:
        batch = max(_batch(block, recipe) for block in layer.blocks)
        # Gradients, the kept ones and masked copies; for scores and for values' changes, a gradient and two moments.
        parameters = 4 * FLOAT32 * (recipe.refine.tunes_masks + recipe.refine.tunes_weights)
        wider = 2 * FLOAT32 if recipe.itemsize == FLOAT32 else 0  # gradients' sums are float64 then
        tuned = (2 * FLOAT32 + parameters + wider + recipe.itemsize) * layer.weights
        moments.append(Footprint(device=tuned + 2 * batch))
    return moments


def _device(held: Footprint) -> float:
    return held.device


def _streams(model: ModelShapes, recipe: Recipe, arrays: int | None = None) -> Footprint:
    """Arrays of calibration activations in memory; None: those that go from layer to layer."""
    host = recipe.in_memory(recipe.activations(model.hidden, arrays), model.hidden)
    return Footprint(host, recipe.on_device(model.hidden, arrays))


def in_files(model: ModelShapes, recipe: Recipe) -> float:
    """Bytes of activations that no memory is left for, where they are most: between layers, or when allocating."""
    most = max(recipe.activations(model.hidden), sum(_allocated_from(model, recipe)))
    return most - recipe.in_memory(most, model.hidden)


def _allocated_from(model: ModelShapes, recipe: Recipe) -> tuple[float, float]:
    """Bytes of activations in a look at the dense model: of arrays, and of every layer's input for some tokens."""
    if recipe.allocation is Allocation.UNIFORM:
        return 0, 0
    by_loss = recipe.allocation is Allocation.LOSS
    inputs = len(model.layers) * recipe.loss_tokens * model.hidden * recipe.itemsize if by_loss else 0
    return recipe.activations(model.hidden, recipe.allocating), inputs


def _embedding(model: ModelShapes, recipe: Recipe) -> list[Footprint]:
    """The parameters outside the layers, a shard at a time: the file's pages and the copies, and the shard before."""
    outside, kept = model.outside * recipe.stored, model.embedding * recipe.stored
    shard = max(OUTSIDE_SHARD_BYTES, kept)
    first = min(outside, shard)
    before = min(outside - first, shard)
    embedded = Footprint(host=kept, device=model.embedding * _converted(recipe)) + _streams(model, recipe, 1)
    return [Footprint(host=2 * first + before), embedded]


def _converted(recipe: Recipe) -> float:
    """Bytes of a parameter's copy for computing, if it needs one: on a CPU of the same dtype it does not."""
    return 0 if recipe.on_cpu and recipe.itemsize == recipe.stored else recipe.itemsize


def _layer(layer: LayerShapes, recipe: Recipe) -> Footprint:
    """A layer as it was read and as it is computed with, its pruned weights and masks, and those of the one before.

    The next one is read ahead meanwhile. Of methods that update weights the updated ones are there, too.
    """
    host = layer.parameters * recipe.stored
    device = layer.parameters * _converted(recipe) + (0 if recipe.on_cpu else host)
    copies = 3 if recipe.initial in UPDATING else 2
    return Footprint(2 * host, device + layer.weights * (copies * recipe.stored + BOOL))


def _reading(model: ModelShapes, recipe: Recipe) -> Footprint:
    """A layer is read, and the file's pages are there, while the last one and its pruned weights are still held."""
    layer = model.largest_layer
    size = layer.parameters * recipe.stored
    pruned = layer.weights * recipe.stored
    # Written from the device: pruned weights are copied.
    host = 3 * size + (pruned if recipe.on_cpu else 0)
    return _streams(model, recipe) + Footprint(max(host, size + pruned), 0 if recipe.on_cpu else pruned)


def _batch(block: BlockShapes, recipe: Recipe) -> float:
    """What one batch of sequences takes while a block is computed."""
    features, first = block.linears[0][1], sum(rows for rows, _ in block.linears[:-1])
    given = recipe.batch_tokens * max(1, block.share * block.copies)
    return given * (INPUT_ARRAYS * FLOAT32 * features + OUTPUT_ARRAYS * recipe.itemsize * first)


def _updating(layer: LayerShapes, recipe: Recipe) -> Footprint:
    """Gram matrices of the whole layer with a batch, or, larger, with what one linear takes."""
    grams = sum(FLOAT32 * group[0][1] ** 2 * block.copies for block in layer.blocks for group in block.groups)
    matrices, arrays = UPDATING[recipe.initial]
    working = [
        FLOAT32 * (matrices * columns**2 + arrays * rows * columns)
        for block in layer.blocks
        for rows, columns in block.linears
    ]
    return Footprint(device=grams + max(*working, *(_batch(block, recipe) for block in layer.blocks)))


def _rebuilding(block: BlockShapes, recipe: Recipe) -> Footprint:
    """Squares of gradients with a batch and one gradient, or, larger, with scores and their ranking."""
    weights = block.every_weight + block.beside
    squares = FLOAT32 * weights
    passes = _batch(block, recipe) + (recipe.itemsize + FLOAT32) * block.largest
    competing = weights if recipe.granularity is Granularity.BLOCK else block.largest
    ranking = (FLOAT32 + 5 * BOOL) * weights + RANKING * competing
    return Footprint(device=squares + max(passes, ranking))


def _refining(block: BlockShapes, recipe: Recipe) -> Footprint:
    """Gram matrices of the inputs, of training and held-out windows, as sums and as means; arrays of one linear."""
    assert recipe.refine is not None
    streams = 2 if recipe.follows_dense else 1
    refined = (block.every_weight + block.beside) * (recipe.stored + BOOL)
    found = []
    for group in block.groups:
        matrix = FLOAT32 * group[0][1] ** 2
        largest = max(rows * columns for rows, columns in group)
        windows = 2 if recipe.refine.held_out else 1
        at_once = min(block.copies, max(1, MOMENTS_BYTES // (4 * matrix)))
        sums = streams * matrix * windows * (at_once + 1)
        gathering = sums + max(_batch(block, recipe), 2 * streams * matrix)
        arrays = (SOLVING if recipe.refine.solve else ERROR_ARRAYS) * largest
        together = min(largest, WEIGHTS_AT_ONCE if recipe.on_cpu else WEIGHTS_ON_GPU)
        found += [gathering, sums + FLOAT32 * max(arrays, SWAPPING * together + 2 * largest)]
    return Footprint(device=refined + max(found))


def _allocating(model: ModelShapes, recipe: Recipe) -> list[Footprint]:
    """A pass over the dense model: every layer's input for some tokens, the output head, or one layer and the next."""
    of_arrays, of_inputs = _allocated_from(model, recipe)
    arrays = recipe.in_memory(of_arrays, model.hidden)
    on_device = recipe.on_device(model.hidden, recipe.allocating)
    kept = Footprint(recipe.in_memory(of_arrays + of_inputs, model.hidden) - arrays, on_device)
    layer = model.largest_layer
    size, computed = layer.parameters * recipe.stored, layer.parameters * _converted(recipe)
    batch = max(_batch(block, recipe) for block in layer.blocks)
    reading = Footprint(arrays + 3 * size, computed + (0 if recipe.on_cpu else size))
    if recipe.allocation is not Allocation.LOSS:
        return [reading + Footprint(device=on_device + batch)]
    outside = Footprint(model.outside * recipe.stored, model.outside * _converted(recipe))
    logits = min(LOGITS, recipe.tokens * model.vocabulary) * (recipe.itemsize + OF_A_LOGIT * FLOAT32)
    ordering = ORDERING * max(block.largest for block in layer.blocks)
    # The parameters are read as the file has them; on a device these are let go of at once.
    lasting = Footprint(outside.host if recipe.on_cpu and not outside.device else 0, outside.device)
    return [
        kept + reading + lasting,
        outside + Footprint(arrays + outside.host, on_device),
        kept + lasting + Footprint(arrays, logits),
        kept + Footprint(arrays + 2 * size, computed + 2 * batch + (0 if recipe.on_cpu else size)),
        kept + Footprint(arrays + 2 * size, computed + ordering + (0 if recipe.on_cpu else size)),
    ]
