"""Plan how long a run waits for its files: most are written while layers are computed."""

from dataclasses import fields, replace

from llm_barber.checkpoint.schedule import MOST_LAYERS, SHARE
from llm_barber.planning.costs import Costs
from llm_barber.planning.rates import Rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes

LAYER_STAGES = ("initial", "rebuild", "refine", "tune", "propagate")  # computed while files are written
Seconds = dict[str, dict[str, float]]  # by stage and resource


def with_files_kept(costs: Costs, model: ModelShapes, rates: Rates, recipe: Recipe) -> Costs:
    """Count activations after as many layers as the schedule has them written; after each where a layer waits."""
    seconds = _seconds(costs, rates)
    layer, file = _computing(seconds) / len(model.layers), sum(seconds["keep"].values()) / len(model.layers)
    if not recipe.repeatable or not layer:
        return costs
    layers_between = max(1.0, min(file / (SHARE * layer), MOST_LAYERS), file / layer)
    return replace(costs, keep=costs.keep * (1 / layers_between))


def waiting_seconds(costs: Costs, model: ModelShapes, rates: Rates, recipe: Recipe) -> Seconds:
    """Seconds of each stage by resource; of `write` and `keep`, those that the run waits for.

    A CPU that computes cannot hash, or copy to the system's pages, at the same time: all seconds count. A GPU waits
    for the last shard, for a shard that takes longer than the next layer, and for copies off the device.
    """
    seconds = _seconds(costs, rates)
    if recipe.on_cpu or not recipe.repeatable:
        return seconds
    layers, written = len(model.layers), seconds["write"]["disk"]
    meanwhile = _computing(seconds) * (layers - 1) / layers
    seconds["write"]["disk"] = max(written / layers, written - meanwhile)
    seconds["keep"]["disk"] = 0.0
    return seconds


def _seconds(costs: Costs, rates: Rates) -> Seconds:
    return {stage.name: rates.seconds(getattr(costs, stage.name)) for stage in fields(costs)}


def _computing(seconds: Seconds) -> float:
    """Seconds in which layers are computed."""
    return sum(sum(seconds[name].values()) for name in LAYER_STAGES)
