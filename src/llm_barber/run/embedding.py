"""Embed the calibration tokens, the input of the first decoder layer; copy what lies outside the layers."""

from collections.abc import Collection, Mapping
from functools import partial

from torch import Tensor

from llm_barber.checkpoint.locations import parameters_in
from llm_barber.loading.job import Job
from llm_barber.model.array_memory import ArrayMemory
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.run.out_of_memory import with_smaller_batches
from llm_barber.run.writer import Writer
from llm_barber.settings.refining import RefineSettings


def copy_outside(job: Job, writer: Writer, wanted: Collection[str]) -> dict[str, Tensor]:
    """Copy the tensors outside the decoder layers to the output.

    Returns the wanted parameters, by the model's names. It does not read a head that is pruned, unless it is tied.
    """
    locations = {name: job.source.location(name) for name in wanted}
    parameters: dict[str, Tensor] = {}
    for names in job.outside_shards:
        tensors = job.source.read(names)
        if writer.next_is_written:
            writer.skip_shard()
        else:
            writer.write_shard(tensors)
        parameters |= parameters_in(tensors, locations)
    return parameters


def embed(
    job: Job,
    weights: Mapping[str, Tensor],
    refine_settings: RefineSettings | None,
    memory: ArrayMemory,
    progress: Progress,
) -> ActivationStreams:
    """Embed this process's calibration sequences: the input of the first decoder layer.

    Args:
        job: the opened model.
        weights: parameters that embed the tokens, by the model's names.
        refine_settings: None: the run does not refine.
        memory: where activations lie.
        progress: is told of smaller batches.

    Raises:
        DeviceMemoryError: one sequence does not fit the device.
    """
    skeleton, tokens = job.skeleton, job.tokens.input_ids
    held_out = 0 if refine_settings is None else refine_settings.held_out
    streams = ActivationStreams(len(tokens), job.batch_size, memory, job.ranks, held_out)
    local_tokens = streams.select_local(tokens)

    def compute() -> None:
        skeleton.fill_outside(weights)
        for batch in streams.batches():
            skeleton.embed(local_tokens[batch], partial(streams.write, HIDDEN, batch))
        known = {batch.stop - batch.start for batch in streams.batches()}
        for size in _batch_sizes(streams, refine_settings) - known:
            skeleton.embed(tokens[:size], lambda _: None)  # records the arguments that layers get for this size

    with_smaller_batches(compute, skeleton.drop_outside, job, streams, progress)
    skeleton.drop_outside()
    return streams


def _batch_sizes(streams: ActivationStreams, refine_settings: RefineSettings | None) -> set[int]:
    """Sizes of all batches, and of the smaller batches that the run falls back to if memory runs out."""
    sizes = set()
    batch_size = streams.batch_size
    while streams.batch_size:
        sizes |= {batch.stop - batch.start for batch in streams.batches()}
        sizes |= refine_settings.batch_sizes(streams) if refine_settings else set()
        streams.batch_size //= 2
    streams.batch_size = batch_size
    return sizes
