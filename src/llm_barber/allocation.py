"""The sparsity of each decoder layer, from one pass over the dense model before anything is pruned."""

from functools import partial

from llm_barber.errors import SettingsError
from llm_barber.initial import MethodMasks, collect_inputs
from llm_barber.masking.owl import layer_sparsities, outlier_share
from llm_barber.masking.saliency import wanda
from llm_barber.masking.statistics import InputSquares
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress

START = "start"  # the first layer's input, while the pass overwrites it


def allocate_by_outliers(
    initial: MethodMasks, streams: ActivationStreams, sparsity: float, progress: Progress
) -> tuple[float, ...]:
    """OWL's sparsities (arXiv 2310.05175), a layer each; the streams are left as they were.

    What is not pruned counts for nothing: a layer with nothing else is given the sparsity asked for.

    Raises:
        SettingsError: the spread does not fit the sparsity.
    """
    job = initial.job
    streams.copy(HIDDEN, START)
    shares: dict[int, float] = {}
    sizes: dict[int, int] = {}
    progress.start("looking for outliers", job.layer_count)
    for index in range(job.layer_count):
        tensors = job.source.read(job.layer_tensors[index])
        prefix = job.layer_prefix(index)
        parameters = {name: tensors[prefix + name] for name in job.skeleton.layer_names(index)}
        module = job.skeleton.load_layer(index, parameters)
        layer = DecoderLayer(module, initial.linears(index), partial(job.skeleton.arguments, index))
        if layer.linears:
            squares = collect_inputs(layer, streams, InputSquares)
            scores = [
                wanda(parameters[f"{name}.weight"].to(streams.device), squares[name].mean) for name in layer.linears
            ]
            shares[index] = outlier_share(scores)
            sizes[index] = sum(score.numel() for score in scores)
        for batch in streams.batches():
            streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        job.skeleton.release_layer(index)
        progress.advance(f"{shares[index]:.2%} outliers" if index in shares else "not pruned")
    streams.rename(START, HIDDEN)
    streams.drop(START)
    try:
        found = layer_sparsities(list(shares.values()), list(sizes.values()), sparsity)
    except ValueError as error:
        raise SettingsError(
            f"allocation owl: {error}", "choose a sparsity nearer to 0.5, or allocation uniform"
        ) from error
    allocated = dict(zip(shares, found, strict=True))
    return tuple(allocated.get(index, sparsity) for index in range(job.layer_count))
