"""Memory that a run leaves for the calibration activations, on the host and on the device."""

import math
from dataclasses import replace

from llm_barber.errors import SettingsError
from llm_barber.messages import message
from llm_barber.planning.memory import peak_footprint
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes
from llm_barber.usage import readable_bytes

# Factor that the counted memory may be wrong by; copies of the largest stored decoder layer that are counted at least
# (read ahead, computed with, pruned, transposed, ranked, to write); bytes that libraries keep for themselves.
MARGIN, COPIES_OF_A_LAYER, LIBRARIES = 1.2, 10, 2**26
# Bytes that a hint adds: a process holds a little more or less before its first layer at each start.
OTHER_START = 2**26
# Factor and bytes for the device's memory, not measured yet: of one process, and of several, which communicate by NCCL.
DEVICE_MARGIN, DEVICE_LIBRARIES = 1.3, 2**30
DEVICE_MARGIN_TOGETHER, DEVICE_LIBRARIES_TOGETHER = 2.0, 2**31


def device_room(free: float, model: ModelShapes, recipe: Recipe) -> int:
    """Bytes of a device in which activations may stay: free memory less the counted peak and a margin.

    If that is too much after all, one process moves its activations off the device (`run/out_of_memory.py`). Several
    processes cannot, since none can do so alone: their margin is wider.
    """
    margin, libraries = DEVICE_MARGIN, DEVICE_LIBRARIES
    if recipe.processes > 1:
        margin, libraries = DEVICE_MARGIN_TOGETHER, DEVICE_LIBRARIES_TOGETHER
    return max(0, int(free - libraries - margin * peak_footprint(model, recipe).device))


def left_for_activations(memory: int, process: int, model: ModelShapes, recipe: Recipe) -> int:
    """Bytes of `memory` that a run leaves at its peak; `process`: its bytes before the first layer.

    Raises:
        SettingsError: nothing is left.
    """
    counted = MARGIN * peak_footprint(model, replace(recipe, activation_memory=0)).host
    at_least = COPIES_OF_A_LAYER * recipe.stored * model.largest_layer.parameters
    needed = process + LIBRARIES + int(max(counted, at_least))
    if needed > memory:
        raise SettingsError(
            message(
                "{memory}: {given} is too little, even with all calibration activations in files",
                given=readable_bytes(memory, 1024),
            ),
            f"give at least {math.ceil(100 * (needed + OTHER_START) / 2**30) / 100:.2f} GiB; a smaller --batch-size or "
            "--seqlen needs less",
        )
    return memory - needed
