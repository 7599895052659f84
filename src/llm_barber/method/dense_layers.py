"""Dense decoder layers, opened one after the other for passes over the dense model before anything is pruned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from llm_barber.checkpoint.ahead import ReadAhead
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


class DenseLayers:
    """Dense decoder layers, whose linears that are pruned are selected; the next layer is read ahead.

    Args:
        initial_masks: says which linears are pruned.
        streams: the activations.
        following: a reader that begins when the last pass has read all layers.
    """

    def __init__(
        self, initial_masks: InitialMasks, streams: ActivationStreams, following: ReadAhead | None = None
    ) -> None:
        self._initial_masks, self._streams, self._following = initial_masks, streams, following

    def opened(
        self, order: Sequence[int], wanted_again: bool = False
    ) -> Iterator[tuple[int, DecoderLayer, dict[str, Tensor]]]:
        """Open layers in this order; each comes with its number and the weights of its linears, (out, in).

        `wanted_again`: another pass follows.
        """
        job, streams = self._initial_masks.job, self._streams
        read = [job.layer_tensors[index] for index in order]
        following = None if wanted_again else self._following
        with ReadAhead(job.source, read, streams.device.type != "cpu", following) as ahead:
            ahead.begin()
            for index in order:
                try:
                    layer, weights = job.open_layer(index, ahead.take())
                    layer.select(self._initial_masks.linears(index))
                    yield index, layer, weights
                finally:
                    job.skeleton.release_layer(index)
