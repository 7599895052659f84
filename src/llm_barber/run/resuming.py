"""Take up an unfinished run: warnings about it, and the pass of the activations through its finished layers."""

from collections.abc import Mapping
from contextlib import closing

from llm_barber.checkpoint.ahead import Tensors, read_ahead
from llm_barber.loading.job import Job
from llm_barber.messages import counted, first_names
from llm_barber.method.block_pass import dense_batches, follows_dense
from llm_barber.method.layer import move_on
from llm_barber.model.streams import DENSE, DENSE_OUTPUT, HIDDEN, NEXT, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.run.output import RunOutput
from llm_barber.settings.refining import RefineSettings
from llm_barber.usage import machine


def warn_of_unfinished(output: RunOutput, progress: Progress) -> None:
    """Warn of lost files of an unfinished run, of another machine, and of model files that were written since."""
    used, present = output.state.used, machine(output.job.skeleton.device)
    if used.machine not in ("", present):
        progress.warn(
            f"finished layers were computed on {used.machine}: here, on {present}, others may be rounded otherwise"
        )
    warn_of_written(output.job.source.written, used.written, progress)
    if output.lost:
        progress.warn(
            f"{', '.join(output.lost)} of the unfinished run is damaged or missing: {len(output.results)} finished "
            "layers are kept, the rest is computed again"
        )


def warn_of_written(written: Mapping[str, int], before: Mapping[str, int], progress: Progress) -> None:
    """Warn of files of a model that were written after finished layers were computed.

    Args:
        written: modification times of the files, ns.
        before: the same, as they were when layers were computed.
        progress: is told.
    """
    if changed := [name for name, when in before.items() if written.get(name) != when]:
        were = "was" if len(changed) == 1 else "were"
        progress.warn(
            f"{first_names(changed)} of the model {were} modified after layers were computed: if the content changed, "
            "start again with --overwrite"
        )


def pass_finished(output: RunOutput, streams: ActivationStreams, progress: Progress) -> None:
    """Move the streams through the finished layers, as they lie on the disk: the next layer's input is the same."""
    job, settings, finished = output.job, output.prepared.refine_settings, output.results
    if not finished or len(finished) == len(job.steps):
        return
    progress.start(f"once more through {counted(len(finished), 'finished layer')}", len(finished))
    follows = follows_dense(settings)
    with closing(read_ahead(job.source, job.steps[: len(finished)] if follows else ())) as dense_layers:
        for result in finished:
            dense = next(dense_layers) if follows else {}
            pass_layer(job, result, dense, output.read_layer(result.index), settings, streams)
            progress.advance("")


def pass_layer(
    job: Job,
    result: LayerResult,
    dense: Tensors,
    written: tuple[Tensors, Tensors],
    settings: RefineSettings | None,
    streams: ActivationStreams,
) -> None:
    """Move the streams through a finished layer, as `prune_layer` moved them.

    Args:
        job: the opened model.
        result: of the layer.
        dense: the dense layer, by the checkpoint's names; empty if the run does not follow the dense model.
        written: the finished layer by the same names, and the updated weights that it ran with, by linear.
        settings: of refining; a target mix moves the dense model's stream, too.
        streams: the layer's input; afterwards the next layer's.
    """
    index, (tensors, updated) = result.index, written
    if dense:
        layer, _ = job.open_layer(index, dense)
        for batch in dense_batches(settings, streams):
            streams.write(DENSE + NEXT, batch, layer.output(streams.read(DENSE + HIDDEN, batch)))
    layer, weights = job.open_layer(index, tensors)
    weights = weights | job.moved(updated)
    # Contiguous, as the run computed with them: products of other layouts may be rounded otherwise.
    layer.set_weights({linear.name: weights[linear.name].contiguous() for linear in result.linears if linear.pruned})
    for batch in streams.batches():
        streams.write(DENSE_OUTPUT, batch, layer.output(streams.read(HIDDEN, batch)))
    move_on(job, index, layer, streams, bool(dense))
