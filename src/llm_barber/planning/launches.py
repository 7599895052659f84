"""Kernels that a GPU starts in each stage of a run: the host takes time for each, however little the kernel does.

The numbers were counted in runs of a tiny LLaMA and a tiny Mixtral on a pretended GPU, and
`tests/test_device_budgets.py` compares a plan with such runs. Other dense models start up to a fifth more. Where rotary
embeddings or an activation are PyTorch's own operations, a pass of attention starts eight more, one of an MLP one more.
Not counted: loops over columns (SparseGPT, ALPS, DSnoT) and over rounds of swaps, the order of channels, allocation by
outliers, and the output head.
"""

import math
from collections.abc import Iterable, Sequence

from llm_barber.model.architecture import ATTENTION
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.settings.presets import Allocation

LARGE_WEIGHT = 2**24  # a GPU computes with so many elements for longer than the host takes to start an operation
# In a pass of a block over a batch, beside one for each linear: norm, activation and residual; rotary embeddings;
# routing of tokens to experts.
BLOCK, ROTARY, ROUTING = 7, 2, 50
BACKWARD = 1.25  # times the forward
STATISTICS = 7  # of the inputs that some linears read, for a batch
# For each linear of a layer: its initial mask; the ranking of the rebuild; errors of blocks; starting scores of tuning.
MASK, REBUILT, ERRORS, SCORES = 20, 73, 40, 37
REBUILD_GRADIENTS = 11  # for each linear and batch
ALLOCATION_GRADIENTS, LOSS = 15, 27  # of the allocation: for each linear and sequence; of the loss, for a sequence
# Of tuning: for a sequence, and for each linear of it; for each linear in a step, and more where both masks and weights
# are tuned, or for N:M; for a batch of held-out windows. For each expert's linear: to begin, and the border of its
# scores in a step; all else takes the linears of all experts at once.
SEQUENCE, SUMS, STEP, BOTH, PATTERN, JUDGED = 20, 2, 23, 13, 25, 45
EXPERT_SCORES, EXPERT_BORDER = 4, 1
CLIPPING, CLIPPED = 10, 5  # of clipped gradients: for a sequence, and for each linear of it


def layer_launches(layer: LayerShapes, recipe: Recipe) -> dict[str, float]:
    """Kernels of a decoder layer, by stage of `Costs`; none on a CPU."""
    if recipe.on_cpu:
        return {}
    once = _forward(layer.blocks)
    batches = _batches(recipe, recipe.local_sequences)
    linears, groups = _linears(layer.blocks), sum(len(block.groups) for block in layer.blocks)
    launches: dict[str, float] = {"initial": MASK * linears, "propagate": batches * once}
    if recipe.method.reads_inputs:
        launches["initial"] += batches * (once + STATISTICS * groups)
    if recipe.granularity is not None:
        passes = (2 + BACKWARD) * once + REBUILD_GRADIENTS * _kinds(layer.blocks)
        launches["rebuild"] = batches * passes + REBUILT * linears
    if recipe.refine is not None:
        measured = _batches(recipe, recipe.held_out // recipe.tokens or recipe.local_sequences)
        launches["refine"] = (4 * measured + batches * recipe.follows_dense) * once + ERRORS * linears
        if recipe.refine.of_layers:
            launches["tune"] = _tuning(once, layer.blocks, groups, recipe)
    return launches


def _tuning(once: float, blocks: Sequence[BlockShapes], groups: int, recipe: Recipe) -> float:
    """Kernels of tuning a layer, of which a pass over a batch starts `once`."""
    settings = recipe.refine
    assert settings is not None
    stacks = sum(len(block.linears) * (1 if is_stacked(block) else block.copies) for block in blocks)
    stacked = sum(len(block.linears) * block.copies for block in blocks if is_stacked(block))
    held_out = recipe.held_out // recipe.tokens
    sequences = settings.passes * (recipe.local_sequences - held_out) * recipe.tune_turns
    of_sequence = (1 + BACKWARD) * once + SEQUENCE + SUMS * stacks + CLIPPING + CLIPPED * _kinds(blocks)
    masks_and_weights = settings.tunes_masks and settings.tunes_weights
    groups_of_m = settings.tunes_masks and recipe.pattern is not None
    of_step = stacks * (STEP + BOTH * masks_and_weights + PATTERN * groups_of_m)
    of_step += EXPERT_BORDER * stacked * (settings.tunes_masks and recipe.pattern is None)
    judged = (settings.passes + 1) * _batches(recipe, held_out) * (once + JUDGED)
    before = _batches(recipe, recipe.local_sequences) * (once + STATISTICS * groups)
    before += SCORES * stacks + EXPERT_SCORES * stacked
    return before + sequences * of_sequence + settings.passes * recipe.tune_steps * of_step + judged


def allocation_launches(model: ModelShapes, recipe: Recipe) -> float:
    """Kernels of spreading the sparsity over the linears by the loss; 0 on a CPU."""
    if recipe.on_cpu or recipe.allocation is not Allocation.LOSS:
        return 0
    sequences = recipe.loss_tokens // recipe.tokens
    launches: float = sequences * LOSS
    for blocks in (layer.blocks for layer in model.layers):
        launches += _batches(recipe, sequences) * (2 + BACKWARD) * _forward(blocks)
        launches += sequences * ALLOCATION_GRADIENTS * _kinds(blocks)
    return launches


def _batches(recipe: Recipe, sequences: int) -> int:
    return math.ceil(sequences / recipe.batch)


def is_stacked(block: BlockShapes) -> bool:
    """Test for experts whose linears are joined while they are tuned (`method/stacks.py`)."""
    return block.copies > 1 and block.largest <= LARGE_WEIGHT


def _linears(blocks: Iterable[BlockShapes]) -> int:
    """Linears of a layer, of all experts: initial masks, rankings and errors are each linear's own."""
    return sum(len(block.linears) * block.copies for block in blocks)


def _kinds(blocks: Iterable[BlockShapes]) -> int:
    """Linears of a layer, of one expert: products and statistics take all experts at once."""
    return sum(len(block.linears) for block in blocks)


def _forward(blocks: Iterable[BlockShapes]) -> int:
    """Kernels of one pass of a layer over a batch; experts are computed together."""
    return sum(
        len(block.linears) + BLOCK + ROTARY * (block.name == ATTENTION) + ROUTING * (block.copies > 1)
        for block in blocks
    )
