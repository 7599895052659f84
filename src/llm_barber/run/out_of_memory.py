"""Repeat what did not fit a device's memory: activations off the device, then smaller batches."""

from collections.abc import Callable
from typing import TypeVar

import torch

from llm_barber.errors import BarberError
from llm_barber.loading.job import Job
from llm_barber.model.device import experts_per_token, is_out_of_memory, needed_memory
from llm_barber.model.streams import ActivationStreams
from llm_barber.progress import Progress

Result = TypeVar("Result")


class DeviceMemoryError(BarberError):
    """The device's memory is too small."""


def with_smaller_batches(
    compute: Callable[[], Result],
    release: Callable[[], None],
    job: Job,
    streams: ActivationStreams,
    progress: Progress,
) -> Result:
    """What `compute` gives; where the device's memory is too small, again with all activations in host memory.

    Where it still is, with half as many sequences together.

    Args:
        compute: may be called again after it failed.
        release: frees what `compute` left on the device.
        job: the run.
        streams: whose arrays leave the device, and whose batches become smaller.
        progress: is told.

    Raises:
        DeviceMemoryError: one sequence does not fit, or other processes wait for this one.
    """
    skeleton = job.skeleton
    while True:
        try:
            return compute()
        except RuntimeError as error:  # which holds on to tensors until here
            if not is_out_of_memory(error):
                raise
        release()
        if streams.on_device:
            if streams.ranks.count > 1:
                raise DeviceMemoryError(
                    "the device's memory is too small beside the activations that stay there",
                    "go on with --resume --activations-off-device",
                )
            streams.leave_device()
            _empty_cache()
            progress.warn("the device's memory is too small: activations lie in host memory from now on")
            continue
        if streams.batch_size == 1:
            seqlen = job.tokens.input_ids.shape[1]
            needed = needed_memory(skeleton.layers, seqlen, skeleton.dtype, experts_per_token(skeleton.model.config))
            raise DeviceMemoryError(
                f"the device's memory is too small for one sequence of {seqlen} tokens, which takes about "
                f"{needed / 2**30:.1f} GiB",
                "use a shorter --seqlen, --dtype bfloat16, a larger device, or --device cpu",
            )
        if streams.ranks.count > 1:  # the others are in the middle of it
            raise DeviceMemoryError(
                f"the device's memory is too small for {streams.batch_size} sequences together",
                f"go on with --resume --batch-size {max(1, streams.batch_size // 2)}",
            )
        streams.halve_batches()
        _empty_cache()
        progress.warn(f"the device's memory is too small: {streams.batch_size} sequences together from now on")


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
