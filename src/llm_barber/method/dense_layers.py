"""Dense decoder layers, opened one after the other for passes over the dense model before anything is pruned."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from torch import Tensor

from llm_barber.checkpoint.ahead import read_ahead
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams

START = "start"  # array of the first layer's input, while a pass overwrites it


@contextmanager
def first_input_kept(streams: ActivationStreams) -> Iterator[None]:
    """Restore the first layer's input after a pass that overwrites it with other layers' inputs."""
    streams.copy(HIDDEN, START)
    try:
        yield
    finally:
        streams.swap(START, HIDDEN)
        streams.drop(START)


def dense_layers(
    initial_masks: InitialMasks, order: Sequence[int]
) -> Iterator[tuple[int, DecoderLayer, dict[str, Tensor]]]:
    """Open dense layers in an order, their linears selected that are pruned; the next layer is read ahead.

    Yields:
        A layer's number, the layer, and the weights of its linears, (out, in).
    """
    job = initial_masks.job
    with closing(read_ahead(job.source, [job.layer_tensors[index] for index in order])) as layers:
        for index in order:
            try:
                layer, weights = job.open_layer(index, next(layers))
                layer.select(initial_masks.linears(index))
                yield index, layer, weights
            finally:
                job.skeleton.release_layer(index)
