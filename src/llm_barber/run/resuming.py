"""What a run takes over from an unfinished one that it goes on with, and leaves for one that goes on with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from pydantic import ValidationError
from torch import Tensor

from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.checkpoint.state import START_AGAIN, STATE_NAME, Used
from llm_barber.errors import NotFiniteError, OutputError
from llm_barber.loading.job import Job
from llm_barber.messages import message
from llm_barber.method.block_pass import dense_batches
from llm_barber.method.layer import move_on
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.run.out_of_memory import with_smaller_batches
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.writer import Writer
from llm_barber.settings.refining import RefineSettings
from llm_barber.usage import machine, peak_device_memory, peak_memory


def as_before(prepared: PreparedRun, used: Used, progress: Progress) -> PreparedRun:
    """Compute as the run did that this one goes on with: results are rounded alike then."""
    here = machine(prepared.job.skeleton.device)
    if used.machine not in ("", here):
        progress.warn(
            f"finished layers were computed on {used.machine}: here, on {here}, others may be rounded otherwise"
        )
    warn_of_written(prepared.job.source.written, used.written, progress)
    if used.batch_size is None or prepared.config.batch_size is not None:
        return prepared
    return replace(prepared, job=replace(prepared.job, batch_size=used.batch_size))


def warn_of_written(written: Mapping[str, int], before: Mapping[str, int], progress: Progress) -> None:
    """Warn of files of a model that were written since finished layers were computed.

    Args:
        written: when each file was written, ns.
        before: the same, when layers were computed.
        progress: is told.
    """
    if others := [name for name, when in before.items() if written.get(name) != when]:
        progress.warn(
            message(
                "{files} of the model came here since finished layers were computed: if what is in it is not the "
                "same, start again with {overwrite}",
                files=f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''}",
            )
        )


def tell_of_lost(writer: Writer, finished: int, progress: Progress) -> None:
    """Say what of an unfinished run is made again."""
    if writer.lost:
        progress.warn(
            f"{', '.join(writer.lost)} of the unfinished run is damaged or missing: {finished} finished layers are "
            "whole, what else there was is made again"
        )


def pass_layer(
    job: Job,
    result: LayerResult,
    tensors: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    settings: RefineSettings | None,
    streams: ActivationStreams,
) -> None:
    """Move the streams through a finished layer, as `prune_layer` did.

    Args:
        job: the run.
        result: the layer's record.
        tensors: dense, by the checkpoint's names.
        written: as they were written.
        settings: of the run's refining, which may move the dense model's activations, too.
        streams: what the layer starts from; then what the next one does.
    """
    index = result.index
    dense = dense_batches(settings, streams)
    if dense:
        layer, _ = job.open_layer(index, tensors)
        for batch in dense:
            streams.write(DENSE + NEXT, batch, layer.output(streams.read(DENSE + HIDDEN, batch)))
    layer, weights = job.open_layer(index, {**tensors, **written})
    _check_counts(result, weights)
    # Laid out as they were when they were computed with: products of other layouts may be rounded otherwise.
    layer.set_weights({one.name: weights[one.name].contiguous() for one in result.linears if one.pruned})
    for batch in streams.batches():
        streams.write(DENSE_OUTPUT, batch, layer.output(streams.read(HIDDEN, batch)))
    move_on(job, index, layer, streams, bool(dense))


def _check_counts(result: LayerResult, weights: Mapping[str, Tensor]) -> None:
    """Compare a finished layer's shard with the counts that the state keeps of it.

    Raises:
        OutputError: a linear has another number of zeros.
    """
    for linear in result.linears:
        weight = weights[linear.name]
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if zeros != linear.zeros:
            raise OutputError(
                f"layer {result.index} {linear.name} of the unfinished run has {zeros} zeros, {STATE_NAME} says "
                f"{linear.zeros}",
                START_AGAIN,
            )


def pass_layers(
    prepared: PreparedRun,
    finished: list[LayerResult],
    ahead: ReadAhead,
    writer: Writer,
    streams: ActivationStreams,
    progress: Progress,
) -> None:
    """Move the streams through finished layers whose output was not durable yet, or is damaged."""
    job, settings = prepared.job, prepared.refine_settings
    progress.start("once more through finished layers", len(finished))
    for result in finished:
        written = job.ranks.tensors_from_first(writer.read_shard(len(job.outside_shards) + result.index))
        compute = partial(pass_layer, job, result, ahead.take(), written, settings, streams)
        with_smaller_batches(compute, partial(job.skeleton.release_layer, result.index), job, streams, progress)
        progress.advance("")
    writer.keep_activations(finished[-1].index + 1, gathered(prepared, streams))


def gathered(prepared: PreparedRun, streams: ActivationStreams) -> dict[str, Tensor]:
    """On the process that writes, what the next layer starts from, of all processes."""
    job, sequences = prepared.job, len(prepared.job.tokens.input_ids)
    return job.ranks.gather(streams.between_layers(), sequences, streams.held_out, streams.memory.empty_off_device)


def used_by(prepared: PreparedRun, writer: Writer, streams: ActivationStreams) -> Used:
    """By this run and the one that it goes on with."""
    device, before = prepared.job.skeleton.device, writer.state.used
    on_device = [one for one in (peak_device_memory(device), before.peak_device_memory) if one is not None]
    return Used(
        peak_memory=max(peak_memory(), before.peak_memory),
        peak_device_memory=max(on_device, default=None),
        batch_size=streams.batch_size,
        machine=machine(device),
        off_device=before.off_device or streams.left_device,
        written=prepared.job.source.written,
    )


def finished_layers(writer: Writer) -> list[LayerResult]:
    """Those of the run that this one goes on with."""
    try:
        return [LayerResult.model_validate(layer) for layer in writer.state.layers]
    except ValidationError as error:
        raise OutputError(f"{writer.folder / STATE_NAME} is damaged", START_AGAIN) from error


@contextmanager
def told_how_to_go_on(writer: Writer, progress: Progress) -> Iterator[None]:
    """Say how to go on when an error ends the run."""
    try:
        yield
    except BaseException as error:
        if writer.resumable and not isinstance(error, NotFiniteError):
            count = len(writer.state.layers)
            kept = (
                f"{count} finished layer{'s are' if count > 1 else ' is'}"
                if count
                else "what sparsity each linear is given is"
            )
            goes_on = "{kept} kept in {folder}: the same command with {resume} goes on"
            progress.warn(message(goes_on, kept=kept, folder=writer.folder))
        if writer.saving:
            progress.warn("what the next layer starts from is still being written: this waits for it")
        raise
