"""Running statistics of the inputs of a layer's linears."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams


class Statistic(Protocol):
    """A running statistic of a linear's inputs."""

    def update(self, inputs: Tensor) -> None:
        """Add a batch, (sequences, tokens, in)."""

    def parts(self) -> list[Tensor]:
        """Sums that the processes add up."""

    @property
    def mean(self) -> Tensor:
        """The statistic over all sequences."""


AnyStatistic = TypeVar("AnyStatistic", bound=Statistic)


def collect_inputs(
    layer: DecoderLayer,
    streams: ActivationStreams,
    statistic: Callable[[int, torch.device], AnyStatistic],
    output: str | None = None,
) -> dict[str, AnyStatistic]:
    """Running statistic of each linear's inputs, by linear, over the sequences of all processes.

    Linears that read the same tensor (q, k, v; gate, up) share one.

    Args:
        layer: the decoder layer.
        streams: the layer's input.
        statistic: makes a statistic of a number of features on a device.
        output: name of the array that takes the layer's output; None: the layer is run to its last linear's input.
    """
    statistics: dict[str, AnyStatistic] = {}
    for batch in streams.batches():
        seen: list[Tensor] = []
        updated: list[AnyStatistic] = []

        def visit(name: str, inputs: Tensor, seen: list[Tensor] = seen, updated: list[AnyStatistic] = updated) -> None:
            alone = name in layer.called_again  # called several times, it has more inputs than its neighbours
            if not alone and seen and seen[-1] is inputs:
                statistics[name] = updated[-1]
                return
            if name not in statistics:
                statistics[name] = statistic(inputs.shape[-1], inputs.device)
            statistics[name].update(inputs)
            if not alone:
                seen[:] = [inputs]
                updated[:] = [statistics[name]]

        following = layer.visit_inputs(streams.read(HIDDEN, batch), visit, stop=output is None)
        if output is not None and following is not None:
            streams.write(output, batch, following)
    for shared in {id(shared): shared for shared in statistics.values()}.values():
        streams.ranks.add(shared)
    return statistics
