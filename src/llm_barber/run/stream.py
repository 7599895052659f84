"""The run, from disk to disk: embed the calibration text; read each decoder layer, prune it, write it; done.

`method/layer.py` says what happens to a layer's weights. A weight passes through four hands: `read_ahead` reads it from
the dense model, `prune_layer` decides whether it stays and with which value, `RunOutput.finish_layer` writes the layer
while the next one is computed, and `finish_output` gives the whole output its name.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from functools import partial

from torch import Tensor

from llm_barber.checkpoint.ahead import read_ahead
from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder
from llm_barber.checkpoint.locations import parameters_in
from llm_barber.checkpoint.output import work_folder
from llm_barber.method.allocation import allocate
from llm_barber.method.block_pass import follows_dense
from llm_barber.method.head import prune_head
from llm_barber.method.layer import prune_layer
from llm_barber.method.reordering import find_order
from llm_barber.model.device import device_memory_checked, fixed_order
from llm_barber.model.streams import DENSE, HIDDEN, ActivationStreams
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.record.report import RunReport
from llm_barber.run.activation_memory import activation_memory
from llm_barber.run.finishing import finish_output, warn_of_results
from llm_barber.run.output import RunOutput, open_output
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.resuming import pass_finished, warn_of_unfinished
from llm_barber.settings.presets import Allocation


def run(prepared: PreparedRun, progress: Progress) -> RunReport:
    """Prune the model, layer by layer, from disk to disk; resume where an unfinished run stopped."""
    prepared.warn_of_settings(progress)
    order = fixed_order(prepared.job.skeleton.device)
    with order, device_memory_checked(), open_output(prepared, progress) as output:
        warn_of_unfinished(output, progress)
        progress.stage("embedding the calibration tokens")
        with output.clock.stage("embed"):
            streams, outside = _embed(output)
        _reorder(output, streams, progress)
        _allocate(output, outside, streams, progress)
        pass_finished(output, streams, progress)
        _prune_layers(output, streams, progress)
        with output.clock.stage("write"):
            output.wait()
        report = finish_output(output)
    warn_of_results(prepared, report, progress)
    return report


def _prune_layers(output: RunOutput, streams: ActivationStreams, progress: Progress) -> None:
    """Prune the layers that are not finished, in turn; the next one is read, and the last one written, meanwhile."""
    job, finished = output.job, len(output.results)
    title = "pruning" if output.prepared.command == "prune" else "rebuilding"
    progress.start(title, len(job.steps), finished=finished)
    with closing(read_ahead(job.source, job.steps[finished:])) as layers:
        for index in range(finished, len(job.steps)):
            progress.advance(_summary(_finish_step(output, index, layers, streams)))


def _finish_step(
    output: RunOutput, index: int, layers: Iterator[dict[str, Tensor]], streams: ActivationStreams
) -> LayerResult:
    """Read, prune and write a decoder layer, or, after the last layer, the output head."""
    prepared, job, clock = output.prepared, output.job, output.clock
    initial_masks, settings = prepared.initial_masks, prepared.refine_settings
    began = clock.total
    with clock.stage("read"):
        tensors = next(layers)
    with clock.stage("layers"):
        if index < job.layer_count:
            pruned = prune_layer(job, index, tensors, initial_masks, prepared.rebuild_settings, settings, streams)
        else:
            pruned = prune_head(job, tensors, initial_masks, settings, streams)
    with clock.stage("write"):
        return output.finish_layer(tensors, pruned, clock.total - began)


def _copy_outside(output: RunOutput, wanted: Collection[str]) -> dict[str, Tensor]:
    """Copy the tensors outside the decoder layers to the output; returns the wanted ones by the model's names.

    A head that is pruned is read later, unless it is tied.
    """
    job = output.job
    locations = {name: job.source.location(name) for name in wanted}
    parameters: dict[str, Tensor] = {}
    for names in job.outside_shards:
        tensors = job.source.read(names)
        output.write_outside(tensors)
        parameters |= parameters_in(tensors, locations)
    return parameters


def _embed(output: RunOutput) -> tuple[ActivationStreams, dict[str, Tensor]]:
    """Embed this process's calibration sequences: the input of the first decoder layer.

    Returns the activations, and the parameters outside the layers, by the model's names, that an allocation by the loss
    needs.
    """
    prepared, job = output.prepared, output.job
    skeleton, tokens, settings = job.skeleton, job.tokens.input_ids, prepared.refine_settings
    memory = activation_memory(prepared, work_folder(prepared.config.output))
    needs_loss = prepared.allocation is Allocation.LOSS and output.state.sparsities is None
    outside = _copy_outside(output, skeleton.outside_names_and_head if needs_loss else skeleton.outside_names)
    held_out = 0 if settings is None else settings.held_out
    streams = ActivationStreams(len(tokens), job.batch_size, memory, job.ranks, held_out)
    local_tokens = streams.select_local(tokens)
    skeleton.fill_outside({name: outside[name] for name in skeleton.outside_names})
    batches = list(streams.batches())
    for batch in batches:
        skeleton.embed(local_tokens[batch], partial(streams.write, HIDDEN, batch))
    further = settings.batch_sizes(streams) - {batch.stop - batch.start for batch in batches} if settings else ()
    for size in further:
        skeleton.embed(tokens[:size], lambda _: None)  # records the arguments that layers get for this size
    skeleton.drop_outside()
    if follows_dense(settings):
        streams.copy(HIDDEN, DENSE + HIDDEN)
    return streams, outside if needs_loss else {}


def _reorder(output: RunOutput, streams: ActivationStreams, progress: Progress) -> None:
    """Read the dense model's channels in another order from here on: the unfinished run's, or one that is found now.

    Raises:
        UnfinishedRunError: the order of the finished layers is lost, and another one was found.
    """
    prepared = output.prepared
    if not prepared.reorders:
        return
    content = output.read_order()
    if content is None:
        if output.state.channel_order is not None:
            progress.warn(f"{ORDER_NAME} of the unfinished run is damaged or missing: the order is found again")
        with output.clock.stage("reorder"):
            order = find_order(prepared.initial_masks, prepared.movable_channels, streams, progress)
        content = output.keep_order(order.to_json())
    output.job.source.order = ChannelOrder.from_json(content)


def _allocate(output: RunOutput, outside: dict[str, Tensor], streams: ActivationStreams, progress: Progress) -> None:
    """Give each linear its sparsity: the unfinished run's, or a new one from passes over the dense model.

    `outside`: parameters outside the layers, by the model's names; used up.
    """
    initial_masks, allocation = output.prepared.initial_masks, output.prepared.allocation
    if initial_masks.budget is None or allocation is Allocation.UNIFORM:
        return
    sparsities: Mapping[str, float] | None = output.state.sparsities
    if sparsities is None:
        with output.clock.stage("allocate"):
            found = allocate(allocation, initial_masks, outside, streams, initial_masks.budget, progress)
        sparsities = output.keep_sparsities(found)
    initial_masks.set_sparsities(sparsities)


def _summary(layer: LayerResult) -> str:
    """Line of progress about a finished layer."""
    errors = [
        f"{block.name} error {block.error_before:.3g} → {block.error_after:.3g}"
        for block in layer.blocks
        if block.error_before is not None
    ]
    if layer.kept_pass is not None:  # tuning aims at another target than the blocks' own output
        before, after = layer.held_out[0], layer.held_out[layer.kept_pass]
        errors = [f"held-out distance from the target {before:.3g} → {after:.3g}"]
    swapped = sum(linear.grown for linear in layer.linears)
    weights = sum(linear.weights for linear in layer.linears)
    sparsity = sum(linear.pruned for linear in layer.linears) / max(1, weights)  # a layer may have no linears
    parts = [f"{sparsity:.1%} pruned", *([f"{swapped:,} swapped"] if errors else []), *errors]
    return ", ".join(parts)
