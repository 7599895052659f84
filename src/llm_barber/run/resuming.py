"""Resume an unfinished run: its settings, its finished layers, and messages about both."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from pydantic import ValidationError
from torch import Tensor

from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.checkpoint.state import START_AGAIN, STATE_NAME, Used
from llm_barber.errors import NotFiniteError, UnfinishedRunError
from llm_barber.loading.job import Job
from llm_barber.messages import counted, first_names, message
from llm_barber.method.block_pass import dense_batches
from llm_barber.method.layer import move_on
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.writer import Writer
from llm_barber.settings.refining import RefineSettings
from llm_barber.usage import machine, peak_device_memory, peak_memory


def take_over_batch_size(prepared: PreparedRun, used: Used, progress: Progress) -> PreparedRun:
    """Take over the unfinished run's batch size, so that results are rounded alike.

    Warn of another machine, and of files that were written since.
    """
    present = machine(prepared.job.skeleton.device)
    if used.machine not in ("", present):
        progress.warn(
            f"finished layers were computed on {used.machine}: here, on {present}, others may be rounded otherwise"
        )
    warn_of_written(prepared.job.source.written, used.written, progress)
    if used.batch_size is None or prepared.config.batch_size is not None:
        return prepared
    return replace(prepared, job=replace(prepared.job, batch_size=used.batch_size))


def warn_of_written(written: Mapping[str, int], before: Mapping[str, int], progress: Progress) -> None:
    """Warn of files of a model that were written after finished layers were computed.

    Args:
        written: modification times of the files, ns.
        before: the same, as they were when layers were computed.
        progress: is told.
    """
    if changed := [name for name, when in before.items() if written.get(name) != when]:
        progress.warn(
            message(
                "{files} of the model {was} modified after layers were computed: if the content changed, start again "
                "with {overwrite}",
                files=first_names(changed),
                was="was" if len(changed) == 1 else "were",
            )
        )


def tell_of_lost(writer: Writer, finished: int, progress: Progress) -> None:
    """Warn of damaged files of an unfinished run, whose content is made again."""
    if writer.lost:
        progress.warn(
            f"{', '.join(writer.lost)} of the unfinished run is damaged or missing: {finished} finished layers are "
            "kept, the rest is computed again"
        )


def pass_layer(
    job: Job,
    result: LayerResult,
    tensors: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    settings: RefineSettings | None,
    streams: ActivationStreams,
) -> None:
    """Move the streams through a finished layer, as `prune_layer` moved them.

    Args:
        job: the opened model.
        result: of the layer, from the state.
        tensors: dense, by the checkpoint's names.
        written: tensors of its shard, by the same names.
        settings: of refining; a target mix moves the dense model's stream, too.
        streams: the layer's input; afterwards the next layer's.
    """
    index = result.index
    dense = dense_batches(settings, streams)
    if dense:
        layer, _ = job.open_layer(index, tensors)
        for batch in dense:
            streams.write(DENSE + NEXT, batch, layer.output(streams.read(DENSE + HIDDEN, batch)))
    layer, weights = job.open_layer(index, {**tensors, **written})
    _check_counts(result, weights)
    # Contiguous, as the run computed with them: products of other layouts may be rounded otherwise.
    layer.set_weights({linear.name: weights[linear.name].contiguous() for linear in result.linears if linear.pruned})
    for batch in streams.batches():
        streams.write(DENSE_OUTPUT, batch, layer.output(streams.read(HIDDEN, batch)))
    move_on(job, index, layer, streams, bool(dense))


def _check_counts(result: LayerResult, weights: Mapping[str, Tensor]) -> None:
    """Compare the zeros of a finished layer's shard with the counts in the state.

    Raises:
        UnfinishedRunError: the counts differ.
    """
    for linear in result.linears:
        weight = weights[linear.name]
        zeros = weight.numel() - int((weight != 0).count_nonzero())
        if zeros != linear.zeros:
            raise UnfinishedRunError(
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
    """Move the streams through finished layers whose output is not durable, or is damaged."""
    job, settings = prepared.job, prepared.refine_settings
    count = len(finished)
    progress.start(f"once more through {counted(count, 'finished layer')}", count)
    for result in finished:
        written = job.ranks.tensors_from_first(writer.read_shard(len(job.outside_shards) + result.index))
        pass_layer(job, result, ahead.take(), written, settings, streams)
        progress.advance("")
    keep_activations_if_due(prepared, finished[-1].index + 1, writer, streams)


def keep_activations_if_due(prepared: PreparedRun, layers: int, writer: Writer, streams: ActivationStreams) -> None:
    """Begin to write the input of the layer after the first `layers`, if the process that writes decides so.

    That process gathers the input from all processes.
    """
    job, sequences = prepared.job, len(prepared.job.tokens.input_ids)
    if job.ranks.from_first(writer.begin_activations(layers)):
        arrays, empty = streams.between_layers(), streams.memory.empty_off_device
        writer.keep_activations(layers, job.ranks.gather(arrays, sequences, streams.held_out, empty))


def used_by(prepared: PreparedRun, writer: Writer, streams: ActivationStreams) -> Used:
    """Memory, machine and batch size of this run and of the run that it resumes."""
    device, before = prepared.job.skeleton.device, writer.state.used
    device_peaks = [peak for peak in (peak_device_memory(device), before.peak_device_memory) if peak is not None]
    return Used(
        peak_memory=max(peak_memory(), before.peak_memory),
        peak_device_memory=max(device_peaks, default=None),
        batch_size=streams.batch_size,
        machine=machine(device),
        written=prepared.job.source.written,
    )


def finished_layers(writer: Writer) -> list[LayerResult]:
    """Results of the layers that the unfinished run had finished.

    Raises:
        UnfinishedRunError: the state is damaged.
    """
    try:
        return [LayerResult.model_validate(layer) for layer in writer.state.layers]
    except ValidationError as error:
        raise UnfinishedRunError(f"{writer.folder / STATE_NAME} is damaged", START_AGAIN) from error


@contextmanager
def hint_at_resuming(writer: Writer, progress: Progress, resumes: bool) -> Iterator[None]:
    """When an error ends the run, say what is kept and how to resume; `resumes`: the same command does."""
    try:
        yield
    except BaseException as error:
        with suppress(Exception):  # the run's own error is reported
            writer.wait_for_shards()
        if writer.resumable and not isinstance(error, NotFiniteError):
            count = len(writer.state.layers)
            kept = f"{count} finished layer{'s are' if count > 1 else ' is'}"
            if not count:
                recorded = "order of channels" if writer.state.channel_order else "sparsity of each linear"
                kept = f"the {recorded} is"
            goes_on = f"{{kept}} kept in {{folder}}: the same command{'' if resumes else ' with {resume}'} goes on"
            progress.warn(message(goes_on, kept=kept, folder=writer.folder))
        if writer.saving:
            progress.warn("activations are still being written: waiting for them")
        raise
