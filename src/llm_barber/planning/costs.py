"""Work of each stage of a run: FLOPs and bytes, by arithmetic on shapes and settings, nothing else.

docs/method/paper.md and docs/method/tuning.md describe the passes. One process's share is counted:
calibration sequences are divided, what every process repeats (ranking, swaps, least squares) is not.
"""

from dataclasses import dataclass, fields, replace

from llm_barber.masking.granularity import Granularity
from llm_barber.planning.initial_costs import (
    allocation_work,
    group_ranking_bytes,
    initial_mask_work,
    ranking_work,
    reordering_work,
    statistics_work,
)
from llm_barber.planning.launches import allocation_launches, layer_launches
from llm_barber.planning.passes import (
    BACKWARD_ATTENTION,
    FLOAT32,
    backward_bytes,
    error_work,
    forward_work,
    gradient_squares_work,
    input_touches,
    loss_work,
    reduction_work,
    streaming_work,
    weight_count,
)
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.refining_costs import linear_refining_work, refining_work, tuning_work
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NO_WORK, Work, sorting_work

REBUILDING = 150  # bytes moved for each weight: scores, comparisons and masks


@dataclass(frozen=True)
class Costs:
    """Work of a process by stage.

    The stages `initial` to `write` add up all layers. `keep`: write activations for `--resume`, counted after each
    layer until `waiting.py` corrects it. `head`: prune the output head.
    """

    embed: Work = NO_WORK
    reorder: Work = NO_WORK
    allocate: Work = NO_WORK
    initial: Work = NO_WORK
    rebuild: Work = NO_WORK
    refine: Work = NO_WORK
    tune: Work = NO_WORK
    propagate: Work = NO_WORK
    read: Work = NO_WORK
    write: Work = NO_WORK
    keep: Work = NO_WORK
    head: Work = NO_WORK

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, stage.name) + getattr(other, stage.name) for stage in fields(self)))

    @property
    def total(self) -> Work:
        """Work of all stages."""
        return sum((getattr(self, stage.name) for stage in fields(self)), NO_WORK)


def run_costs(model: ModelShapes, recipe: Recipe) -> Costs:
    """Work of a run in the process that has the most sequences."""
    head = _head_work(model, recipe) if recipe.prunes_head else NO_WORK
    costs = Costs(
        embed=_embedding_work(model, recipe),
        reorder=reordering_work(model, recipe),
        allocate=allocation_work(model, recipe) + Work(launches=allocation_launches(model, recipe)),
        head=head,
    )
    for index, layer in enumerate(model.layers):
        # No layer starts from the last layer's output.
        last = index == len(model.layers) - 1 and not recipe.prunes_head
        size = layer.parameters * recipe.stored
        # Process 0 keeps the activations of all processes, which send it theirs.
        kept = 0 if last else recipe.durable * recipe.all_tokens * model.hidden * recipe.itemsize
        # Kept arrays that stay on the device are copied off it: they are the first to stay.
        copied = kept / recipe.processes * (1 - recipe.moved_share(model.hidden, recipe.durable))
        costs += _launches(layer, recipe)
        costs += Costs(
            initial=sum((initial_mask_work(layer, block, recipe) for block in layer.blocks), NO_WORK),
            rebuild=sum((_rebuilding_work(block, recipe) for block in layer.blocks), NO_WORK),
            refine=sum((refining_work(layer, block, recipe) for block in layer.blocks), NO_WORK),
            tune=tuning_work(layer, recipe),
            propagate=_propagation_work(layer, recipe),
            read=Work(read=size, copied=size),
            write=Work(written=size, copied=size),
            keep=Work(kept=kept, copied=copied, reduced=kept * (recipe.processes - 1) / recipe.processes),
        )
    return costs


def _launches(layer: LayerShapes, recipe: Recipe) -> Costs:
    return Costs(**{stage: Work(launches=count) for stage, count in layer_launches(layer, recipe).items()})


def _embedding_work(model: ModelShapes, recipe: Recipe) -> Work:
    outside = model.outside * recipe.stored
    hidden = recipe.local_tokens * model.hidden * recipe.itemsize
    copied = model.embedding * recipe.itemsize + hidden * recipe.moved_share(model.hidden, 1)
    return Work(read=outside, written=outside, copied=copied, moved=2 * hidden)


def _rebuilding_work(block: BlockShapes, recipe: Recipe) -> Work:
    """Work of rebuilding a block's mask: y_sparse, y_dense, back to the first linears, gradients, ranking."""
    if recipe.granularity is None:
        return NO_WORK
    tokens = recipe.local_tokens
    once = forward_work(block, recipe, tokens)
    first = sum(weight_count(linear) for linear in block.linears[:-1])
    routed, weights = tokens * block.share * block.copies, block.all_weights
    back = Work(
        products=2 * routed * (block.weights - first),
        gradients=2 * routed * block.weights,
        attention=BACKWARD_ATTENTION * once.attention,
        moved=once.moved if recipe.on_cpu else backward_bytes(recipe, once),
    )
    back += loss_work(block, recipe, tokens) + gradient_squares_work(block, recipe)
    group_size = {
        Granularity.OUTPUT: block.linears[0][1], Granularity.INPUT: block.linears[0][0],
        Granularity.LINEAR: block.largest, Granularity.BLOCK: weights + block.other_weights,
    }[recipe.granularity]  # fmt: skip
    ranking = Work(
        moved=REBUILDING * weights + 2 * group_ranking_bytes(recipe, weights),
        sorted=2 * sorting_work(weights, group_size),
    )
    moved = streaming_work(block, recipe, tokens, 3)
    return once * 2 + back + ranking + moved + reduction_work(recipe, FLOAT32 * weights)


def _propagation_work(layer: LayerShapes, recipe: Recipe) -> Work:
    """Work of running the final blocks; attention runs again where tuning changed it after its run."""
    total, tokens = NO_WORK, recipe.local_tokens
    for block in layer.blocks:
        changed = recipe.refine is not None and (recipe.refine.of_linears or recipe.granularity is not None)
        runs_twice = changed and recipe.refine is not None and recipe.refine.of_layers and block is layer.blocks[0]
        once = forward_work(block, recipe, tokens) + streaming_work(block, recipe, tokens, 2.5)
        once += error_work(block, recipe, tokens)
        total += once * (2 if runs_twice else 1)
    return total


def _head_work(model: ModelShapes, recipe: Recipe) -> Work:
    """Work of pruning the output head on the last layer's output; a tied head is written, too."""
    block, tokens = model.head_block, recipe.local_tokens
    work = ranking_work(block, recipe)
    passes = 0
    if recipe.method.reads_inputs:
        work += statistics_work(block, recipe)
        passes += 1
    if recipe.refine is not None:
        work += linear_refining_work(block, replace(recipe, refine=recipe.refine.of_head))
        passes += 2 if recipe.follows_dense else 1
    hidden = tokens * model.hidden * recipe.itemsize
    return work + Work(
        read=model.outside * recipe.stored,
        written=block.weights * recipe.stored if model.tied else 0,
        copied=model.outside * recipe.itemsize + passes * hidden * recipe.moved_share(model.hidden),
        moved=passes * input_touches(recipe) * hidden,
    )
