"""A plan in words: where a model's decoder layers and linears are, and what the run does to them."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from llm_barber.model.architecture import Block, kind_of
from llm_barber.model.skeleton import Skeleton
from llm_barber.planning.recipe import Recipe


def structure_lines(skeleton: Skeleton, known: bool) -> tuple[str, ...]:
    """Describe the decoder layers, their blocks and what stays dense in lines; layers with the same blocks share lines.

    Args:
        skeleton: the empty model.
        known: the family has an entry, so that its structure was not searched for.
    """
    lines = [f"layers: {skeleton.architecture.layers}, {'known for this family' if known else 'found by structure'}"]
    kinds: dict[tuple[Block, ...], list[int]] = {}
    for index, blocks in enumerate(skeleton.blocks):
        alike = (
            replace(block, linears=tuple(dict.fromkeys(kind_of(name) for name in block.linears))) for block in blocks
        )
        kinds.setdefault(tuple(alike), []).append(index)
    for blocks, layers in kinds.items():
        prefix = "" if len(kinds) == 1 else f"layers {ranges(layers)}: "
        for block in blocks:
            linears = ", ".join(name.removeprefix(f"{block.output}.") for name in block.linears)
            lines.append(f"{prefix}{block.name} ({block.output}): {linears}")
        if dense := _dense_weights(skeleton.layers[layers[0]], {name for block in blocks for name in block.linears}):
            lines.append(f"{prefix}stays dense: {', '.join(dense)}")
    return tuple(lines)


def _dense_weights(layer: nn.Module, linears: Collection[str]) -> list[str]:
    """Weights of a layer, of two dimensions or more, that are not pruned, with their shapes."""
    dense = {}
    for name, parameter in layer.named_parameters():
        module = kind_of(name).removesuffix(".weight")
        if parameter.dim() > 1 and module not in linears:
            dense[module] = " × ".join(map(str, parameter.shape))
    return [f"{name} ({shape})" for name, shape in dense.items()]


def ranges(numbers: list[int]) -> str:
    """Join ascending numbers; consecutive numbers become a range.

    Example: [0, 1, 2, 5] -> "0-2, 5".
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def settings_in_words(recipe: Recipe) -> str:
    """Describe the run in one line.

    Example: "wanda, rebuilt within each output".
    """
    parts = [
        "channels reordered" if recipe.reorders else "",
        f"allocation by {recipe.allocation}" if recipe.allocation.value != "uniform" else "",
        recipe.method.value,
        f"rebuilt within each {recipe.granularity}" if recipe.granularity else "",
        recipe.refine.words if recipe.refine else "",
        str(recipe.pattern) if recipe.pattern else "",
        "the output head, too" if recipe.prunes_head else "",
    ]
    return ", ".join(filter(None, parts))
