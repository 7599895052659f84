"""Repeat a computation that did not fit the device's memory, first with activations off the device."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from llm_barber.errors import BarberError
from llm_barber.gpu.out_of_memory import is_out_of_memory
from llm_barber.loading.job import Job
from llm_barber.messages import counted
from llm_barber.model.device import experts_per_token, needed_memory, stored_score_bytes
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
    """Compute; if the device's memory is too small, repeat with all activations in host memory.

    If it still is too small, repeat with half as many sequences together.

    Args:
        compute: may be called again after it failed.
        release: frees what `compute` left on the device.
        job: the opened model.
        streams: their arrays leave the device, and their batches become smaller.
        progress: is told.

    Raises:
        DeviceMemoryError: one sequence does not fit, or other processes wait for this one.
    """
    while True:
        try:
            return compute()
        except RuntimeError as error:  # the error keeps tensors alive until this block ends
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
            seqlen, needed = _needed_by_a_window(job)
            raise DeviceMemoryError(
                f"the device's memory is too small for one window of {seqlen} tokens, which takes about "
                f"{needed / 2**30:.1f} GiB",
                "use a shorter --seqlen, --dtype bfloat16, a larger device, or --device cpu",
            )
        if streams.ranks.count > 1:  # other processes are in the middle of the computation
            raise DeviceMemoryError(
                f"the device's memory is too small for {streams.batch_size} windows at a time",
                f"go on with --resume --batch-size {max(1, streams.batch_size // 2)}",
            )
        streams.halve_batches()
        _empty_cache()
        progress.warn(
            f"the device's memory is too small: {counted(streams.batch_size, 'window')} at a time from now on"
        )


def _needed_by_a_window(job: Job) -> tuple[int, int]:
    """Tokens of a calibration window, and an estimate of the bytes that the largest layer takes with one."""
    skeleton, seqlen = job.skeleton, job.tokens.input_ids.shape[1]
    config = skeleton.model.config
    needed = needed_memory(
        skeleton.layers,
        seqlen,
        skeleton.dtype,
        experts_per_token=experts_per_token(config),
        score_bytes=stored_score_bytes(config),
    )
    return seqlen, needed


def _empty_cache() -> None:
    if torch.cuda.is_available():
        gc.collect()  # what failed may be in cycles, which hold memory of the device
        torch.cuda.empty_cache()
