"""How much memory a run may take: what is left for the calibration activations, and the device's share."""

import math

import torch

from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import SettingsError
from llm_barber.job import Job
from llm_barber.model.streams import HostMemory
from llm_barber.settings import RunSettings
from llm_barber.usage import current_memory

# Of the largest decoder layer in float32: as it was read, the one read ahead, computed with, pruned, masks, statistics.
COPIES_OF_A_LAYER = 10


def host_memory(job: Job, settings: RunSettings, writer: CheckpointWriter | Follower) -> HostMemory:
    """Where activations lie, so that the process stays within `settings.memory`; sets the device's limit, too.

    Raises:
        SettingsError: one decoder layer does not fit.
    """
    device = job.skeleton.device
    if settings.device_memory is not None and device.type == "cuda":
        every = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.device_memory / every), device)
    if settings.memory is None:
        return HostMemory()
    largest = max(sum(one.numel() for one in layer.parameters()) for layer in job.skeleton.layers)
    beside = " or the output head" if job.prunes_head else ""
    if job.prunes_head:
        largest = max(largest, job.skeleton.head.weight.numel())
    needed = current_memory() + COPIES_OF_A_LAYER * 4 * largest
    if needed > settings.memory:
        raise SettingsError(
            f"memory: {settings.memory / 2**30:.2f} GiB are not enough for one decoder layer{beside}",
            f"give at least {math.ceil(100 * needed / 2**30) / 100:.2f} GiB",
        )
    folder = next(place for place in (writer.work, *writer.work.parents) if place.is_dir())
    return HostMemory(settings.memory - needed, folder)
