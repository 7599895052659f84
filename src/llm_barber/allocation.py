"""The sparsity of each decoder layer, from one pass over the dense model before anything is pruned."""

from functools import partial

from llm_barber.errors import SettingsError
from llm_barber.initial import collect_inputs
from llm_barber.job import Job
from llm_barber.masking.owl import layer_sparsities, outlier_share
from llm_barber.masking.saliency import wanda
from llm_barber.masking.statistics import InputSquares
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress

START = "start"  # the first layer's input, while the pass overwrites it


def allocate_by_outliers(job: Job, streams: ActivationStreams, sparsity: float, progress: Progress) -> list[float]:
    """OWL's sparsities (arXiv 2310.05175); the streams are left as they were.

    Raises:
        SettingsError: the spread does not fit the sparsity.
    """
    streams.copy(HIDDEN, START)
    shares, sizes = [], []
    progress.start("looking for outliers", job.layer_count)
    for index in range(job.layer_count):
        tensors = job.source.read(job.layer_tensors[index])
        prefix = job.layer_prefix(index)
        parameters = {name: tensors[prefix + name] for name in job.skeleton.layer_names(index)}
        module = job.skeleton.load_layer(index, parameters)
        layer = DecoderLayer(module, job.architecture.linears, partial(job.skeleton.arguments, index))
        squares = collect_inputs(layer, streams, InputSquares)
        scores = [wanda(parameters[f"{name}.weight"].to(streams.device), squares[name].mean) for name in layer.linears]
        shares.append(outlier_share(scores))
        sizes.append(sum(score.numel() for score in scores))
        for batch in streams.batches():
            streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        job.skeleton.release_layer(index)
        progress.advance(f"{shares[-1]:.2%} outliers")
    streams.rename(START, HIDDEN)
    streams.drop(START)
    try:
        return layer_sparsities(shares, sizes, sparsity)
    except ValueError as error:
        raise SettingsError(
            f"allocation owl: {error}", "choose a sparsity nearer to 0.5, or allocation uniform"
        ) from error
