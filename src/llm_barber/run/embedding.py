"""Embed the calibration tokens, the input of the first decoder layer; copy what lies outside the layers."""

from collections.abc import Collection, Mapping
from functools import partial

from torch import Tensor

from llm_barber.checkpoint.locations import parameters_in
from llm_barber.loading.job import Job
from llm_barber.model.streams import HIDDEN, ActivationStreams, ArrayMemory
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
) -> ActivationStreams:
    """Embed this process's calibration sequences: the input of the first decoder layer.

    Args:
        job: the opened model.
        weights: parameters that embed the tokens, by the model's names.
        refine_settings: None: the run does not refine.
        memory: where activations lie.
    """
    skeleton, tokens = job.skeleton, job.tokens.input_ids
    held_out = 0 if refine_settings is None else refine_settings.held_out
    streams = ActivationStreams(len(tokens), job.batch_size, memory, job.ranks, held_out)
    local_tokens = streams.select_local(tokens)

    skeleton.fill_outside(weights)
    for batch in streams.batches():
        skeleton.embed(local_tokens[batch], partial(streams.write, HIDDEN, batch))
    known = {batch.stop - batch.start for batch in streams.batches()}
    further = refine_settings.batch_sizes(streams) - known if refine_settings else set()
    for size in further:
        skeleton.embed(tokens[:size], lambda _: None)  # records the arguments that layers get for this size
    skeleton.drop_outside()
    return streams
