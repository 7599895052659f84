"""Choice of the memory for calibration activations: the device's, the host's, or files."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from llm_barber.loading.job import Job
from llm_barber.model.streams import ArrayMemory
from llm_barber.planning.limits import left_for_activations
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import model_shapes
from llm_barber.settings.run import RunSettings
from llm_barber.usage import current_memory

LIMITED: set[torch.device] = set()  # by a run of this process; the next run without --device-memory lifts the limit


def activation_memory(job: Job, settings: RunSettings, recipe: Recipe, folder: Path) -> ArrayMemory:
    """Choose where activations lie within `settings.memory`; limit the device's memory, too.

    Raises:
        SettingsError: what a run needs besides activations does not fit.
    """
    device, shapes = job.skeleton.device, model_shapes(job.skeleton)
    if device.type == "cuda" and (settings.device_memory is not None or device in LIMITED):
        _limit_device(device, settings.device_memory)
    memory = ArrayMemory(device, on_device=device.type == "cuda" and not settings.activations_off_device)
    if settings.memory is None:
        return memory
    left = left_for_activations(settings.memory, current_memory(), shapes, recipe)
    # Beside the output. Another machine may lack that folder: there, where temporary files go (`TMPDIR`).
    folders = (path for path in (folder, folder.parent) if path.is_dir() and os.access(path, os.W_OK))
    return replace(memory, limit=left, folder=next(folders, None))


def _limit_device(device: torch.device, device_memory: int | None) -> None:
    """Let this process take `device_memory` bytes of a GPU; None: all of it."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if device_memory is None else min(1.0, device_memory / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    LIMITED.add(device)
