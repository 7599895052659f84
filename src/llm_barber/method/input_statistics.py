"""Running statistics of the inputs of a layer's linears."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams


class Statistic(Protocol):
    """A running statistic of a linear's inputs."""

    def update(self, inputs: Tensor) -> None:
        """Add a batch, (sequences, tokens, in); rows of zeros pad the inputs of experts."""

    def parts(self) -> list[Tensor]:
        """Sums that the processes add up."""


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
        updating = _Updating(layer, statistics, statistic)
        following = layer.visit_inputs(streams.read(HIDDEN, batch), updating, stop=output is None)
        if output is not None and following is not None:
            streams.write(output, batch, following)
    # Processes visit experts in other orders, by the tokens that each has: they add up statistics in one order.
    in_order = [statistics[name] for name in layer.linears if name in statistics]
    for shared in {id(shared): shared for shared in in_order}.values():
        streams.ranks.add(shared)
    return statistics


class _Updating(Generic[AnyStatistic]):
    """Updates statistics with the inputs of one run; calls with the same tensor update what they share once.

    Args:
        layer: the layer.
        statistics: by linear; missing ones are added.
        statistic: makes a statistic for a number of features.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        statistics: dict[str, AnyStatistic],
        statistic: Callable[[int, torch.device], AnyStatistic],
    ) -> None:
        self._layer, self._statistics, self._statistic = layer, statistics, statistic
        self._latest: Tensor | None = None
        self._shared: AnyStatistic | None = None  # updated with the latest tensor

    def __call__(self, name: str, inputs: Tensor) -> None:
        # A linear that is called several times has more inputs than its neighbours, and shares no statistic.
        alone = name in self._layer.called_again
        if alone or inputs is not self._latest or self._shared is None:
            if name not in self._statistics:
                self._statistics[name] = self._statistic(inputs.shape[-1], inputs.device)
            self._statistics[name].update(inputs)
            if not alone:
                self._latest, self._shared = inputs, self._statistics[name]
        else:
            self._statistics[name] = self._shared
