"""Choice of the memory for calibration activations: the device's, the host's, or files."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from llm_barber.errors import SettingsError
from llm_barber.loading.job import OUTSIDE_SHARD_BYTES
from llm_barber.method.allocation import LOGITS
from llm_barber.method.refine import MOMENTS_BYTES
from llm_barber.model.device import experts_per_token, stored_score_bytes
from llm_barber.model.streams import ArrayMemory
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.usage import current_memory, readable_bytes

FLOAT32 = 4
LAYERS = 8  # copies of the largest layer, as it is stored: read ahead, computed with, pruned, to write
# Float32 numbers for each weight of the layer while masks are ranked; and while it is tuned: its values, gradients and
# their sums, then, for scores of masks and for changes of weights each, values, gradients and two moments.
RANKED, TUNED, TUNED_EACH = 4, 5, 4
TOKEN_ARRAYS = 20  # float32 arrays of a batch, as wide as the widest linear
# Float32 copies of the largest linear and of its Gram matrix while a method updates weights, swaps or solves.
LINEARS, GRAMS = 18, 5
LIBRARIES = 2**26  # bytes that libraries keep for themselves
OTHER_START = 2**26  # bytes that a hint adds: a process holds a little more or less at each start
LIMITED: set[torch.device] = set()  # by a run of this process; the next run without --device-memory lifts the limit


def activation_memory(prepared: PreparedRun, folder: Path) -> ArrayMemory:
    """Choose where activations lie within `settings.memory`; limit the device's memory, too.

    Args:
        prepared: the run.
        folder: of files of activations, if it can be written to.

    Raises:
        SettingsError: what a run needs besides activations does not fit.
    """
    device, settings = prepared.job.skeleton.device, prepared.config
    if device.type == "cuda" and (settings.device_memory is not None or device in LIMITED):
        _limit_device(device, settings.device_memory)
    memory = ArrayMemory(device, on_device=device.type == "cuda" and not settings.activations_off_device)
    if settings.memory is None:
        return memory
    # Beside the output. Another machine may lack that folder: there, where temporary files go (`TMPDIR`).
    folders = (path for path in (folder, folder.parent) if path.is_dir() and os.access(path, os.W_OK))
    return replace(memory, limit=left_for_activations(prepared, settings.memory), folder=next(folders, None))


def left_for_activations(prepared: PreparedRun, memory: int) -> int:
    """Bytes of `memory` that a run leaves for calibration activations.

    Raises:
        SettingsError: nothing is left.
    """
    needed = least_memory(prepared)
    if needed > memory:
        least = math.ceil(100 * (needed + OTHER_START) / 2**30) / 100
        raise SettingsError(
            f"--memory: {readable_bytes(memory, 1024)} is too little, even with all calibration activations in files",
            f"give at least {least:.2f} GiB; a smaller --batch-size or --seqlen needs less",
        )
    return memory - needed


def least_memory(prepared: PreparedRun) -> int:
    """Bound of the bytes of host memory that a run takes besides calibration activations.

    What the process holds now, and the largest of three needs: of the tensors outside the layers, of the largest
    decoder layer, of an output head that is pruned.
    """
    job, skeleton = prepared.job, prepared.job.skeleton
    sizes = [job.source.tensors[name].bytes for names in job.outside_shards for name in names]
    logits: int = min(LOGITS, job.tokens.input_ids.shape[1] * job.config.vocab_size)
    needs = [2 * sum(sizes) + min(sum(sizes), OUTSIDE_SHARD_BYTES) + 6 * FLOAT32 * logits]
    largest = max(range(job.layer_count), key=lambda index: _parameters(skeleton.layers[index]))
    linears = [skeleton.layers[largest].get_submodule(name) for name in skeleton.linears(largest)]
    needs.append(_pruning_bytes(prepared, _parameters(skeleton.layers[largest]), linears))
    if job.prunes_head:
        needs.append(sum(sizes) + _pruning_bytes(prepared, _parameters(skeleton.head), [skeleton.head]))
    return current_memory() + LIBRARIES + max(needs)


def _pruning_bytes(prepared: PreparedRun, parameters: int, linears: Sequence[nn.Module]) -> int:
    """Bound of the host memory in which linears are pruned together; `parameters`: of the layer that has them."""
    job, refine = prepared.job, prepared.refine_settings
    stored = job.source.bytes / sum(math.prod(tensor.shape) for tensor in job.source.tensors.values())
    copies = math.ceil(LAYERS * stored * parameters)
    if job.skeleton.device.type != "cpu" or not linears:
        return copies
    shapes: list[tuple[int, ...]] = [linear.get_parameter("weight").shape for linear in linears]
    shapes = [shape[::-1] if job.architecture.transposed else shape for shape in shapes]
    weights, largest = sum(map(math.prod, shapes)), max(map(math.prod, shapes))
    numbers = [RANKED * weights]
    if refine is not None and refine.of_layers:
        numbers.append((TUNED + TUNED_EACH * (refine.tunes_masks + refine.tunes_weights)) * weights)
    method = prepared.initial_masks.method  # None: a checkpoint's masks
    updates = method is not None and method.has_updates
    if updates or (refine is not None and refine.of_linears):
        grams = [columns**2 for _, columns in shapes]
        gathered = sum(grams) if updates else min(4 * sum(grams), MOMENTS_BYTES // FLOAT32)
        numbers.append(gathered + GRAMS * max(grams) + LINEARS * largest)
    config, seqlen = job.skeleton.model.config, job.tokens.input_ids.shape[1]
    tokens = job.batch_size * seqlen
    batch = TOKEN_ARRAYS * tokens * experts_per_token(config) * max(map(max, shapes))
    scores: int = stored_score_bytes(config) * tokens * seqlen
    return copies + 2 * job.skeleton.dtype.itemsize * parameters + FLOAT32 * (max(numbers) + batch) + scores


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _limit_device(device: torch.device, device_memory: int | None) -> None:
    """Let this process take `device_memory` bytes of a GPU; None: all of it."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if device_memory is None else min(1.0, device_memory / total)
    torch.cuda.set_per_process_memory_fraction(share, device)
    LIMITED.add(device)
