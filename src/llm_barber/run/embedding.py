"""The input of the first decoder layer, and how layers are called with every number of sequences that may come up."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from llm_barber.errors import BarberError
from llm_barber.loading.job import Job
from llm_barber.model.array_memory import ArrayMemory
from llm_barber.model.device import experts_per_token, is_out_of_memory, needed_memory
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.settings.refining import RefineSettings

Found = TypeVar("Found")


class DeviceMemoryError(BarberError):
    """The device's memory is too small."""


def embed(
    job: Job,
    weights: Mapping[str, Tensor],
    refine_settings: RefineSettings | None,
    memory: ArrayMemory,
    progress: Progress,
) -> ActivationStreams:
    """The input of the first decoder layer for this process's calibration sequences.

    Args:
        job: the run.
        weights: what embeds the tokens, by the model's names.
        refine_settings: if the run refines.
        memory: where activations lie.
        progress: is told of smaller batches.

    Raises:
        DeviceMemoryError: one sequence does not fit the device.
    """
    skeleton, tokens = job.skeleton, job.tokens.input_ids
    held_out = 0 if refine_settings is None else refine_settings.held_out
    streams = ActivationStreams(len(tokens), job.batch_size, memory, job.ranks, held_out)
    own = streams.select_local(tokens)

    def compute() -> None:
        skeleton.fill_outside(weights)
        for batch in streams.batches():
            skeleton.embed(own[batch], partial(streams.write, HIDDEN, batch))
        known = {batch.stop - batch.start for batch in streams.batches()}
        for size in _batch_sizes(streams, refine_settings) - known:
            skeleton.embed(tokens[:size], lambda _: None)  # for how layers are called with so many

    with_smaller_batches(compute, skeleton.drop_outside, job, streams, progress)
    skeleton.drop_outside()
    return streams


def _batch_sizes(streams: ActivationStreams, refine_settings: RefineSettings | None) -> set[int]:
    """Numbers of sequences that layers may be called with: of all batches, and of smaller ones if memory runs out."""
    sizes = set()
    whole = streams.batch_size
    while streams.batch_size:
        sizes |= {batch.stop - batch.start for batch in streams.batches()}
        sizes |= refine_settings.batch_sizes(streams) if refine_settings else set()
        streams.batch_size //= 2
    streams.batch_size = whole
    return sizes


def with_smaller_batches(
    compute: Callable[[], Found],
    release: Callable[[], None],
    job: Job,
    streams: ActivationStreams,
    progress: Progress,
) -> Found:
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
