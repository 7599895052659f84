"""Sources of initial masks: a pruning method (`method_masks.py`) or a pruned checkpoint (`checkpoint_masks.py`)."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams


class InitialMasks(Protocol):
    """Gives the initial mask and pruned weights of the linears of a decoder layer."""

    def __call__(
        self, index: int, layer: DecoderLayer, dense: Mapping[str, Tensor], streams: ActivationStreams
    ) -> dict[str, PrunedLinear]:
        """One for each linear in `dense` that is pruned; the others stay. `streams` has the layer's input."""
        ...
