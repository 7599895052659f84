"""The output that a decoder layer is tuned towards.

It is the dense layer's output on the inputs of the pruned layer (`target_mix` 0, as EBFT, 2024), on those of the dense
model (1), or a mix of both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_barber.method.distance import Distance, usual_squares
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import DENSE, HIDDEN, NEXT, TARGET, ActivationStreams


def write_targets(
    layer: DecoderLayer, dense: Mapping[str, Tensor] | None, target_mix: float, streams: ActivationStreams
) -> Distance:
    """Write a layer's target output for every window (`TARGET`), and return the distance that measures from it.

    Args:
        layer: the decoder layer, with any weights.
        dense: dense weights, (out, in), by linear; None: `TARGET` has the dense layer's output on its input already.
        target_mix: 0 to 1, the dense model's share in the target.
        streams: the layer's input; unless the target mix is 0, also the dense model's output (`DENSE + NEXT`).
    """
    if dense is not None:
        layer.set_weights(dense)
    squares = []
    for batch in streams.batches():
        target = streams.read(DENSE + NEXT, batch) if target_mix else None
        if target is None or target_mix < 1:
            output = streams.read(TARGET, batch) if dense is None else layer.output(streams.read(HIDDEN, batch))
            target = output if target is None else output.float().lerp(target.float(), target_mix).to(layer.dtype)
        if dense is not None or target_mix:
            streams.write(TARGET, batch, target)
        squares.append(usual_squares(target))
    total = torch.stack(squares).sum(0)
    streams.ranks.add_tensor(total)
    return Distance.of(total)
