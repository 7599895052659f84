"""How much each stage of a run computes, moves, reads and writes: arithmetic on shapes and settings, nothing else.

docs/method/paper.md and docs/method/tuning.md describe the passes. One process's share is counted:
calibration sequences are divided, what every process repeats (ranking, swaps, least squares) is not.
"""

from dataclasses import dataclass, fields, replace

from llm_barber.masking.granularity import Granularity
from llm_barber.planning.initial_costs import allocate, choose, initial, statistics, within_groups
from llm_barber.planning.passes import (
    BACKWARD_ATTENTION,
    FLOAT32,
    INPUT_TOUCHES,
    SQUARING,
    forward,
    reduced,
    size_of,
    streamed,
)
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.refining_costs import improved, refine, tune
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NONE, Work, sorting
from llm_barber.settings.initial import Initial

REBUILDING = 150  # bytes a weight, of scores, comparisons and masks


@dataclass(frozen=True)
class Costs:
    """What a process does, by stage; layers by what is done in them. `keep`: meanwhile."""

    embed: Work = NONE
    allocate: Work = NONE
    initial: Work = NONE
    rebuild: Work = NONE
    refine: Work = NONE
    tune: Work = NONE
    propagate: Work = NONE
    read: Work = NONE
    write: Work = NONE
    keep: Work = NONE
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
    found = Costs(embed=_embed(model, recipe), allocate=allocate(model, recipe), head=head)
    for index, layer in enumerate(model.layers):
        # Nothing starts from its output.
        last = index == len(model.layers) - 1 and not recipe.prunes_head
        size = layer.parameters * recipe.stored
        # Of all processes: the first one keeps it, and is sent what the others have.
        kept = 0 if last else recipe.durable * recipe.every_token * model.hidden * recipe.itemsize
        # Off the device what stayed there: arrays that layers start from are the first to.
        copied = size + kept / recipe.processes * (1 - recipe.moved_share(model.hidden, recipe.durable))
        found += Costs(
            initial=sum((initial(layer, block, recipe) for block in layer.blocks), NONE),
            rebuild=sum((_rebuild(block, recipe) for block in layer.blocks), NONE),
            refine=sum((refine(layer, block, recipe) for block in layer.blocks), NONE),
            tune=tune(layer, recipe),
            propagate=_propagate(layer, recipe),
            read=Work(read=size, copied=size),
            write=Work(written=size, copied=copied, reduced=kept * (recipe.processes - 1) / recipe.processes),
            keep=Work(written=kept),
        )
    return found


def _embed(model: ModelShapes, recipe: Recipe) -> Work:
    outside = model.outside * recipe.stored
    hidden = recipe.own_tokens * model.hidden * recipe.itemsize
    copied = model.embedding * recipe.itemsize + hidden * recipe.moved_share(model.hidden, 1)
    return Work(read=outside, written=outside, copied=copied, moved=2 * hidden)


def _rebuild(block: BlockShapes, recipe: Recipe) -> Work:
    """y_sparse; y_dense, back to the block's first linears; every sequence's gradients of weights; ranking."""
    if recipe.granularity is None:
        return NONE
    tokens = recipe.own_tokens
    once = forward(block, recipe, tokens)
    first = sum(size_of(linear) for linear in block.linears[:-1])
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
        moved=REBUILDING * weights + 2 * within_groups(recipe, weights), sorted=2 * sorting(weights, together)
    )
    moved = streamed(block, recipe, tokens, 3)
    return once * 2 + back + ranking + moved + reduced(recipe, FLOAT32 * weights)


def _propagate(layer: LayerShapes, recipe: Recipe) -> Work:
    """The final blocks; attention once more where tuning changed it after it had been run."""
    found = NONE
    for block in layer.blocks:
        changed = recipe.refine is not None and (recipe.refine.of_linears or recipe.granularity is not None)
        again = changed and recipe.refine is not None and recipe.refine.of_layers and block is layer.blocks[0]
        once = forward(block, recipe, recipe.own_tokens) + streamed(block, recipe, recipe.own_tokens, 2.5)
        found += once * (2 if again else 1)
    return found


def _prune_head(model: ModelShapes, recipe: Recipe) -> Work:
    """The output head on the last layer's output; written, where it had no weights of its own."""
    block, tokens = model.head_block, recipe.own_tokens
    found = choose(block, recipe)
    passes = 0
    if recipe.initial is not Initial.MAGNITUDE:
        found += statistics(block, recipe)
        passes += 1
    if recipe.refine is not None:
        found += improved(block, replace(recipe, refine=recipe.refine.of_head))
        passes += 2 if recipe.follows_dense else 1
    hidden = tokens * model.hidden * recipe.itemsize
    return found + Work(
        read=model.outside * recipe.stored,
        written=block.weights * recipe.stored if model.tied else 0,
        copied=model.outside * recipe.itemsize + passes * hidden * recipe.moved_share(model.hidden),
        moved=passes * INPUT_TOUCHES * hidden,
    )
