"""Plan how long a run waits for its files: most are read and written while layers are computed."""

from dataclasses import fields, replace

from llm_barber.planning.costs import Costs
from llm_barber.planning.rates import Rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes

LAYER_STAGES = ("initial", "rebuild", "refine", "tune", "propagate")  # computed while files are written
DEVICE_KINDS = ("compute", "memory", "link")  # resources that are busy while the host starts further kernels
Seconds = dict[str, dict[str, float]]  # by stage and resource


def with_files_kept(costs: Costs, model: ModelShapes, rates: Rates, recipe: Recipe) -> Costs:
    """Count no files of activations: a run keeps none."""
    return replace(costs, keep=costs.keep * 0.0)


def waiting_seconds(costs: Costs, model: ModelShapes, rates: Rates, recipe: Recipe) -> Seconds:
    """Seconds of each stage by resource; of the disk, those that the run waits for.

    A CPU that computes cannot hash, or copy to the system's pages, at the same time: all seconds count. On a GPU the
    next layer is read, and the last one written, while a layer is computed. The run waits for the first layer, for the
    last shard, for copies off the device, and where the disk takes longer for a layer and a shard than the GPU for a
    layer. Where an allocation keeps all layers on the device, the first layer is read while gradients go back.
    Activations are written seldom enough that nothing waits for them. Where a run cannot be repeated from earlier
    activations, each layer waits for its files to be written.
    """
    seconds, layers = _seconds(costs, rates), len(model.layers)
    if recipe.on_cpu:
        return seconds
    behind = ("read", "write") if recipe.repeatable else ("read",)
    disk = sum(seconds[name]["disk"] for name in behind)
    back = _going_back(seconds["allocate"]) if _layers_stay(model, recipe) else 0.0
    read_early = min(seconds["read"]["disk"] / layers, back)
    waited = _waited(disk, _computing(seconds), layers) - read_early
    for name in behind:
        seconds[name]["disk"] *= waited / disk if disk else 0.0
    if recipe.repeatable:
        seconds["keep"]["disk"] = 0.0
    for name in ("reorder", "allocate"):
        disk = seconds[name].pop("disk")
        meanwhile = sum(seconds[name].values()) - (back if name == "allocate" else 0.0)
        seconds[name]["disk"] = _waited(disk, meanwhile, layers)
    return seconds


def _going_back(allocate: dict[str, float]) -> float:
    """Seconds in which gradients of the loss go back: each layer is computed again, and its gradients take as long."""
    return (allocate["compute"] + allocate["memory"]) * 2 / 3


def _layers_stay(model: ModelShapes, recipe: Recipe) -> bool:
    """True if an allocation by the loss goes back through layers that all stayed on the device."""
    all_layers = model.layer_parameters * recipe.stored
    return recipe.kept_on_device(all_layers, model.hidden) == all_layers


def _waited(disk: float, computing: float, layers: int) -> float:
    """Seconds that a run waits for a disk that works while layers are computed.

    It waits for the first layer, and then for as long as the disk takes longer than the computing.
    """
    return disk / layers + max(0.0, disk - computing) * (layers - 1) / layers


def _seconds(costs: Costs, rates: Rates) -> Seconds:
    """Seconds of each stage by resource; of launches, those that are not hidden behind the device's work."""
    seconds = {stage.name: rates.seconds(getattr(costs, stage.name)) for stage in fields(costs)}
    for by_kind in seconds.values():
        of_device = sum(by_kind[kind] for kind in DEVICE_KINDS)
        by_kind["launches"] = max(0.0, by_kind["launches"] - of_device)
    return seconds


def _computing(seconds: Seconds) -> float:
    """Seconds in which layers are computed."""
    return sum(sum(seconds[name].values()) for name in LAYER_STAGES)
