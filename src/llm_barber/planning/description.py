"""A plan in words: where a model's decoder layers and linears are, and what the run does to them."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from llm_barber.messages import ranges
from llm_barber.model.architecture import Block, kind_of
from llm_barber.model.skeleton import Skeleton
from llm_barber.settings.presets import Allocation, rebuild_defaults
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings


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


def settings_in_words(config: PruneConfig, refine: RefineSettings | None) -> str:
    """Describe the run in one line; `refine`: the settings of refining and tuning.

    Example: "wanda, rebuilt within each output".
    """
    granularity, _ = rebuild_defaults(config.method, config.granularity, config.rebuild_ratio, config.target)
    parts = [
        "channels reordered" if config.reorders else "",
        f"allocation by {config.allocated_by}" if config.allocated_by is not Allocation.UNIFORM else "",
        config.method.value,
        f"rebuilt within each {granularity}" if config.rebuilds else "",
        refine.words if refine else "",
        str(config.target),
        "the output head, too" if config.prune_head else "",
    ]
    return ", ".join(filter(None, parts))
