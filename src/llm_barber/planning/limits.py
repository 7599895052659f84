"""How much memory a run may take: what is left for the calibration activations, and the device's share."""

import math
import os
from dataclasses import replace

import torch

from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import SettingsError
from llm_barber.loading.job import Job
from llm_barber.messages import message
from llm_barber.model.device import free_device_memory
from llm_barber.model.places import Places
from llm_barber.planning.memory import peak_held
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes, model_shapes
from llm_barber.settings.base import RunSettings
from llm_barber.usage import current_memory, readable_bytes

# What the arithmetic of memory may be wrong by; copies of the largest decoder layer, as it is stored, that are counted
# at least (the one read ahead, computed with, pruned, turned, ranked, to write); what libraries keep for themselves.
MARGIN, COPIES_OF_A_LAYER, LIBRARIES = 1.2, 10, 2**26
# The same of a device's memory, which nobody has measured yet: of one process, and of several, which talk by NCCL.
DEVICE_MARGIN, DEVICE_LIBRARIES = 1.3, 2**30
DEVICE_MARGIN_TOGETHER, DEVICE_LIBRARIES_TOGETHER = 2.0, 2**31

LIMITED: set[torch.device] = set()  # by a run of this program, and not for those after it


def activation_places(job: Job, settings: RunSettings, recipe: Recipe, writer: CheckpointWriter | Follower) -> Places:
    """Where activations lie, so that the process stays within `settings.memory`; sets the device's limit, too.

    Raises:
        SettingsError: what a run needs besides activations does not fit.
    """
    device, shapes = job.skeleton.device, model_shapes(job.skeleton)
    if device.type == "cuda" and (settings.device_memory is not None or device in LIMITED):
        every = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if settings.device_memory is None else min(1.0, settings.device_memory / every)
        torch.cuda.set_per_process_memory_fraction(share, device)
        LIMITED.add(device)
    places = Places(device)
    if device.type == "cuda" and not settings.activations_off_device and not writer.state.used.off_device:
        places.room = device_room(free_device_memory(device, settings.device_memory), shapes, recipe)
    if settings.memory is None:
        return places
    left = left_for_activations(settings.memory, current_memory(), shapes, recipe)
    # Beside the output; on another machine, that may lack the place, where temporary files go (`TMPDIR`).
    beside = (place for place in (writer.folder, writer.folder.parent) if place.is_dir() and os.access(place, os.W_OK))
    return replace(places, limit=left, folder=next(beside, None))


def device_room(free: float, model: ModelShapes, recipe: Recipe) -> int:
    """Bytes of a device's free memory in which activations may stay: what the counted peak, and more, leaves.

    Where that is too much after all, they leave (`embedding.py`); of several processes none can do so alone.
    """
    margin, libraries = DEVICE_MARGIN, DEVICE_LIBRARIES
    if recipe.processes > 1:
        margin, libraries = DEVICE_MARGIN_TOGETHER, DEVICE_LIBRARIES_TOGETHER
    return max(0, int(free - libraries - margin * peak_held(model, recipe).device))


def left_for_activations(memory: int, process: int, model: ModelShapes, recipe: Recipe) -> int:
    """Bytes of `memory` that a process of `process` bytes leaves at its peak.

    Raises:
        SettingsError: there are none.
    """
    held = MARGIN * peak_held(model, replace(recipe, for_activations=0)).host
    at_least = COPIES_OF_A_LAYER * recipe.stored * model.largest_layer.parameters
    needed = process + LIBRARIES + int(max(held, at_least))
    if needed > memory:
        raise SettingsError(
            message(
                "{memory}: {given} are not enough, with all calibration activations in files",
                given=readable_bytes(memory, 1024),
            ),
            f"give at least {math.ceil(100 * needed / 2**30) / 100:.2f} GiB; a smaller --batch-size or --seqlen needs "
            "less",
        )
    return memory - needed
