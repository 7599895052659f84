"""The most memory that a run holds at once, on host and device, by arithmetic on shapes and settings.

Each function counts the memory at a moment when much is alive, as the code stands: that includes what Python still
holds of the previous layer, and pages of the file that is being read.
"""

from dataclasses import dataclass, replace

from llm_barber.loading.job import OUTSIDE_SHARD_BYTES
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.selection import LONGEST_ON_GPU, SORTED_ON_GPU
from llm_barber.masking.swaps import WEIGHTS_AT_ONCE, WEIGHTS_ON_GPU
from llm_barber.method.allocation import LOGITS
from llm_barber.method.refine import MOMENTS_BYTES
from llm_barber.planning.launches import is_stacked
from llm_barber.planning.recipe import Recipe, block_size
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation

FLOAT32, BOOL = 4, 1
# Arrays of a batch: float32 copies of the block's input; outputs that autograd keeps, in the compute dtype.
INPUT_ARRAYS, OUTPUT_ARRAYS = 10, 4
RANKING = 24  # bytes for each weight: two score arrays, both sorted, and masks
# Bytes on a GPU for each weight beside a sort: two score arrays, one of them sorted; and for each weight that it sorts
# together: values, their indices twice, and the sort's own copies (aten/src/ATen/native/cuda/SortStable.cu).
BESIDE_SORT, SORTING = 12, 32
HOST_SORTING = 8  # bytes on the host for each weight of a group that is too long for a GPU's sort
SWAPPING = 15  # float32 arrays of the rows that are swapped together
ERROR_ARRAYS = 6  # float32 arrays of a linear, when its error is computed
SOLVING = 10  # float32 arrays of a linear, in least squares
# Float32 copies of a Gram matrix, and of its linear, while a method that gathers Gram matrices updates weights.
UPDATING = {Initial.SPARSEGPT: (4, 5), Initial.ALPS: (5, 8)}
LOGIT_ARRAYS = 4  # float32 arrays of the logits: themselves, their logarithm, gradients of both


@dataclass(frozen=True)
class Footprint:
    """Bytes in host memory and on the device."""

    host: float = 0
    device: float = 0

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.host + other.host, self.device + other.device)


def peak_footprint(model: ModelShapes, recipe: Recipe) -> Footprint:
    """Peak bytes of one process, on host and device, beyond those of the bare process.

    On a CPU all is in host memory. The two peaks may be at different moments.
    """
    moments = [*_embedding(model, recipe), _reading(model, recipe)]
    if recipe.passes_dense:
        moments += _passing_dense(model, recipe)
    streams = _streams(model, recipe)
    for layer in dict.fromkeys(model.layers):
        resident = streams + _layer(layer, recipe)
        moments += [resident + moment for moment in _pruning(layer, recipe)]
    if recipe.prunes_head:
        head, outside = model.head_block, Footprint(device=model.outside * _converted(recipe))
        pruned = Footprint(device=head.weights * (2 * recipe.stored + BOOL))
        working = Footprint()
        if recipe.refine is not None:
            working = _refining(head, replace(recipe, refine=recipe.refine.of_head))
        if recipe.method in UPDATING:
            working = max(working, _updating(LayerShapes((head,), head.weights), recipe), key=_device)
        ranking = _ranking(head.weights, head.weights if recipe.ranks_linears else 0, recipe)
        moments.append(streams + outside + pruned + max(working, ranking, key=_device))
    if recipe.on_cpu:
        return Footprint(host=max(moment.host + moment.device for moment in moments))
    return Footprint(max(moment.host for moment in moments), max(moment.device for moment in moments))


def _pruning(layer: LayerShapes, recipe: Recipe) -> list[Footprint]:
    """Moments of a layer: its masks are chosen, rebuilt, refined and tuned; without the layer itself."""
    largest = max((block.largest for block in layer.blocks), default=0)
    moments = [_ranking(largest, largest if recipe.ranks_linears else 0, recipe)]
    if recipe.method in UPDATING and layer.blocks:
        moments.append(_updating(layer, recipe))
    for block in layer.blocks:
        moments.append(Footprint(device=_batch(block, recipe)))
        if recipe.granularity is not None:
            moments.append(_rebuilding(block, recipe))
        if recipe.refine is not None and recipe.refine.of_linears:
            moments.append(_refining(block, recipe))
    if recipe.refine is not None and recipe.refine.of_layers and layer.blocks:
        batch = max(_batch(block, recipe) for block in layer.blocks)
        # Gradients, kept weights and masked copies; scores and changes of values, each with a gradient and two moments.
        parameters = 4 * FLOAT32 * (recipe.refine.tunes_masks + recipe.refine.tunes_weights)
        wider = 2 * FLOAT32 if recipe.itemsize == FLOAT32 else 0  # sums of gradients are float64 then
        tuned = (2 * FLOAT32 + parameters + wider + recipe.itemsize) * layer.weights
        moments.append(Footprint(device=tuned + 2 * batch + _stacks(layer, recipe)))
    return moments


def _stacks(layer: LayerShapes, recipe: Recipe) -> float:
    """Bytes of stacks of experts' linears while they are tuned.

    Masks, values, weights and gradients of all are copied, in the compute dtype. Of the largest stack there are also
    three arrays in float32: its gradient, and its values twice.
    """
    stacked = [] if recipe.on_cpu else [block for block in layer.blocks if is_stacked(block)]
    copies = (3 * recipe.itemsize + BOOL) * sum(block.all_weights for block in stacked)
    return copies + 3 * FLOAT32 * max((block.largest * block.copies for block in stacked), default=0)


def _device(footprint: Footprint) -> float:
    return footprint.device


def _streams(model: ModelShapes, recipe: Recipe, arrays: int | None = None) -> Footprint:
    """Memory of arrays of calibration activations; `arrays`: as in `Recipe.on_device`."""
    outlasting = recipe.outlasting(model.hidden) if arrays is None else 0
    host = recipe.in_memory(recipe.activations(model.hidden, arrays) + outlasting, model.hidden)
    return Footprint(host, recipe.on_device(model.hidden, arrays))


def in_files(model: ModelShapes, recipe: Recipe) -> float:
    """Most bytes of activations that lie in files at any moment: between layers, or before the first layer."""
    between_layers = recipe.activations(model.hidden) + recipe.outlasting(model.hidden)
    peak = max(between_layers, sum(_dense_activations(model, recipe)))
    return peak - recipe.in_memory(peak, model.hidden)


def _dense_activations(model: ModelShapes, recipe: Recipe) -> tuple[float, float]:
    """Bytes of activations in a pass over the dense model: of arrays, and of every layer's input for some tokens."""
    if not recipe.passes_dense:
        return 0, 0
    by_loss = recipe.allocation is Allocation.LOSS
    inputs = len(model.layers) * recipe.loss_tokens * model.hidden * recipe.itemsize if by_loss else 0
    return recipe.activations(model.hidden, recipe.passing), inputs


def _embedding(model: ModelShapes, recipe: Recipe) -> list[Footprint]:
    """Moments of embedding: the parameters outside the layers, by shard, then the first hidden states.

    A shard takes pages of the file and its copy; the previous shard is still held.
    """
    outside = model.outside * recipe.stored
    kept = outside if recipe.allocation is Allocation.LOSS else model.embedding * recipe.stored
    shard = max(OUTSIDE_SHARD_BYTES, kept)
    first = min(outside, shard)
    before = min(outside - first, shard)
    embedded = Footprint(host=kept, device=model.embedding * _converted(recipe)) + _streams(model, recipe, 1)
    return [Footprint(host=2 * first + before), embedded]


def _converted(recipe: Recipe) -> float:
    """Bytes of a parameter's copy in the compute dtype; 0 on a CPU if it is stored in that dtype."""
    return 0 if recipe.on_cpu and recipe.itemsize == recipe.stored else recipe.itemsize


def _layer(layer: LayerShapes, recipe: Recipe) -> Footprint:
    """A layer as stored and as computed with, pruned weights and masks of it and of the previous layer.

    The next layer is read ahead meanwhile, and the previous layer's shard is written. Methods that update weights hold
    the updated weights, too.
    """
    host = layer.parameters * recipe.stored
    device = layer.parameters * _converted(recipe) + (0 if recipe.on_cpu else host)
    copies = 3 if recipe.method.has_updates else 2
    return Footprint(2 * host + _shard(layer, recipe), device + layer.weights * (copies * recipe.stored + BOOL))


def _shard(layer: LayerShapes, recipe: Recipe) -> float:
    """Bytes of a shard on the host while it is written; on a CPU without the pruned weights, counted as such.

    From a GPU they come in pinned memory, which PyTorch takes in blocks.
    """
    unpruned = max(0, layer.parameters - layer.weights) * recipe.stored
    if recipe.on_cpu:
        return unpruned
    shapes = ((block.copies, rows * columns) for block in layer.blocks for rows, columns in block.linears)
    return unpruned + sum(copies * block_size(weights * recipe.stored) for copies, weights in shapes)


def _reading(model: ModelShapes, recipe: Recipe) -> Footprint:
    """Memory while a layer is read through pages of the file; the previous layer is held, the one before is written."""
    layer = model.largest_layer
    size = layer.parameters * recipe.stored
    pruned = layer.weights * recipe.stored
    # Pruned weights are copied from the device to be written.
    host = 3 * size + _shard(layer, recipe) + (pruned if recipe.on_cpu else 0)
    return _streams(model, recipe) + Footprint(max(host, size + pruned), 0 if recipe.on_cpu else pruned)


def _batch(block: BlockShapes, recipe: Recipe) -> float:
    """Bytes of one batch of sequences while a block is computed."""
    features, first = block.linears[0][1], sum(rows for rows, _ in block.linears[:-1])
    routed = recipe.batch_tokens * max(1, block.share * block.copies)
    rows = routed * (INPUT_ARRAYS * FLOAT32 * features + OUTPUT_ARRAYS * recipe.itemsize * first)
    rows += recipe.batch_tokens * recipe.tokens * block.score_bytes
    return rows


def _updating(layer: LayerShapes, recipe: Recipe) -> Footprint:
    """Gram matrices of the layer, with a batch or with the arrays of one linear, whichever is larger."""
    grams = sum(FLOAT32 * group[0][1] ** 2 * block.copies for block in layer.blocks for group in block.groups)
    working = [_solving(rows, columns, recipe) for block in layer.blocks for rows, columns in block.linears]
    return Footprint(device=grams + max(*working, *(_batch(block, recipe) for block in layer.blocks)))


def _solving(rows: int, columns: int, recipe: Recipe) -> float:
    """Copies of a Gram matrix and of its linear, (rows, columns), and the sort that chooses the linear's mask."""
    matrices, arrays = UPDATING[recipe.method]
    sorts = recipe.method is Initial.ALPS and recipe.ranks_linears and recipe.pattern is None and not recipe.on_cpu
    sorting = SORTING if sorts and rows * columns <= LONGEST_ON_GPU else 0
    return FLOAT32 * (matrices * columns**2 + arrays * rows * columns) + sorting * rows * columns


def _rebuilding(block: BlockShapes, recipe: Recipe) -> Footprint:
    """Squares of gradients, with a batch and a gradient or with scores and ranking, the larger of both."""
    weights = block.all_weights + block.other_weights
    squares = FLOAT32 * weights
    passes = _batch(block, recipe) + (recipe.itemsize + FLOAT32) * block.largest
    competing = weights if recipe.granularity is Granularity.BLOCK else block.largest
    one_group = recipe.granularity in (Granularity.BLOCK, Granularity.LINEAR)
    joined = FLOAT32 * competing if recipe.granularity is Granularity.BLOCK else 0  # the scores of all linears, copied
    ranking = Footprint(device=(FLOAT32 + 5 * BOOL) * weights + joined) + _ranking(
        competing, competing if one_group else 0, recipe
    )
    return Footprint(device=squares) + max(Footprint(device=passes), ranking, key=_device)


def _ranking(weights: float, group: float, recipe: Recipe) -> Footprint:
    """Scores, sorted scores and masks of `weights` that compete in groups of at most `group`, while they are ranked.

    A GPU sorts rows and columns a few at a time; its sort takes more memory than the scores (`sort_on_gpu`).
    """
    if recipe.on_cpu:
        return Footprint(device=RANKING * weights)
    if group > LONGEST_ON_GPU:
        return Footprint(HOST_SORTING * group, RANKING * weights)
    together = max(group, min(weights, SORTED_ON_GPU))
    filled = 0 if group else FLOAT32 * weights  # sorted scores, filled piece by piece
    return Footprint(device=max(RANKING * weights, BESIDE_SORT * weights + filled + SORTING * together))


def _refining(block: BlockShapes, recipe: Recipe) -> Footprint:
    """Gram matrices of the inputs, as sums and as means, and arrays of one linear.

    Training and held-out windows have matrices of their own.
    """
    assert recipe.refine is not None
    streams = 2 if recipe.follows_dense else 1
    refined = (block.all_weights + block.other_weights) * (recipe.stored + BOOL)
    moments = []
    for group in block.groups:
        matrix = FLOAT32 * group[0][1] ** 2
        largest = max(rows * columns for rows, columns in group)
        windows = 2 if recipe.refine.held_out else 1
        at_once = min(block.copies, max(1, MOMENTS_BYTES // (4 * matrix)))
        sums = streams * matrix * windows * (at_once + 1)
        gathering = sums + max(_batch(block, recipe), 2 * streams * matrix)
        arrays = (SOLVING if recipe.refine.solve else ERROR_ARRAYS) * largest
        together = min(largest, WEIGHTS_AT_ONCE if recipe.on_cpu else WEIGHTS_ON_GPU)
        moments += [gathering, sums + FLOAT32 * max(arrays, SWAPPING * together + 2 * largest)]
    return Footprint(device=refined + max(moments))


def _passing_dense(model: ModelShapes, recipe: Recipe) -> list[Footprint]:
    """Moments of a pass over the dense model: layers forward; for the loss's gradients the output head, and back."""
    of_arrays, of_inputs = _dense_activations(model, recipe)
    arrays = recipe.in_memory(of_arrays, model.hidden)
    on_device = recipe.on_device(model.hidden, recipe.passing)
    all_layers = model.layer_parameters * recipe.stored
    on_device_and_layers = on_device + recipe.kept_on_device(all_layers, model.hidden)
    kept = Footprint(recipe.in_memory(of_arrays + of_inputs, model.hidden) - arrays, on_device_and_layers)
    layer = model.largest_layer
    size, computed = layer.parameters * recipe.stored, layer.parameters * _converted(recipe)
    batch = max(_batch(block, recipe) for block in layer.blocks)
    largest = max(block.largest for block in layer.blocks)
    reading = Footprint(arrays + 3 * size, computed + (0 if recipe.on_cpu else size))
    if recipe.allocation is not Allocation.LOSS:
        forward = [reading + Footprint(device=on_device + batch)]
        if recipe.reorders:
            forward.append(reading + Footprint(device=on_device) + _ranking(largest, 0, recipe))
        return forward
    outside = Footprint(model.outside * recipe.stored, model.outside * _converted(recipe))
    logits = min(LOGITS, recipe.tokens * model.vocabulary) * (recipe.itemsize + LOGIT_ARRAYS * FLOAT32)
    ordering = _ranking(largest, 0, recipe)
    # The parameters are read as they are stored; once they are on a device, the copies on the host are freed.
    lasting = Footprint(outside.host if recipe.on_cpu and not outside.device else 0, outside.device)
    return [
        kept + reading + lasting,
        outside + Footprint(arrays + outside.host, on_device),
        kept + lasting + Footprint(arrays, logits),
        kept + Footprint(arrays + 2 * size, computed + 2 * batch + (0 if recipe.on_cpu else size)),
        kept + ordering + Footprint(arrays + 2 * size, computed + (0 if recipe.on_cpu else size)),
    ]
