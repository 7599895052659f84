"""Find an order of channels inside the blocks with which N:M keeps more, in a pass over the dense model.

A linear's inputs can change places if the linears that compute them give their outputs in the new order, too
(`Channels`, in the architecture's record): an MLP's inner channels, and the values of each attention head. The dense
model computes the same in any such order; the run prunes it in the one that is found here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.checkpoint.channel_order import ChannelOrder, Reordered
from llm_barber.errors import overflowed
from llm_barber.loading.job import Job
from llm_barber.masking.channel_order import order_channels
from llm_barber.masking.pattern import NofM
from llm_barber.masking.saliency import wanda
from llm_barber.masking.statistics import InputSquares
from llm_barber.method.dense_layers import dense_layers, first_input_kept
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.model.architecture import Channels
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress


def find_order(
    initial_masks: InitialMasks,
    movable: Sequence[Sequence["MovableChannels"]],
    streams: ActivationStreams,
    progress: Progress,
) -> ChannelOrder:
    """Order channels by Wanda's saliency, with the dense model's inputs.

    The first layer's input is left as it was.

    Args:
        initial_masks: says what is pruned.
        movable: the channels that may change places, by layer.
        streams: the first layer's input.
        progress: is told of each layer.

    Raises:
        NotFiniteError: an activation holds NaN or Inf.
    """
    reordered: list[Reordered] = []
    last = max(index for index, parts in enumerate(movable) if parts)
    progress.start("looking for an order of channels", last + 1)
    with first_input_kept(streams):
        for index, layer, weights in dense_layers(initial_masks, range(last + 1)):
            layer.select([part.channels.reader for part in movable[index]])
            squares = collect_inputs(layer, streams, InputSquares, output=None if index == last else HIDDEN)
            for part in movable[index]:
                reader = part.channels.reader
                mean = squares[reader].mean
                if not mean.isfinite().all():
                    raise overflowed(f"the input of layer {index} {reader}")
                reordered += part.reorder(wanda(weights[reader], mean))
            progress.advance(f"inputs of {len(movable[index])} linears")
    return ChannelOrder(reordered=tuple(reordered))


@dataclass(frozen=True)
class MovableChannels:
    """Channels of a layer that may change places.

    Attributes:
        channels: the linears that write and read them.
        pattern: N:M of the reader.
        heads: number of key-value heads, within which they stay; 1 for an MLP.
        width: number of channels of a head.
        repeats: number of query heads that share a key-value head.
        written, read: dimension that holds the channels, by the checkpoint's name of a tensor: in the writers' weights
            and biases, and in the reader's weight.
    """

    channels: Channels
    pattern: NofM
    heads: int
    width: int
    repeats: int
    written: dict[str, int]
    read: dict[str, int]

    def reorder(self, saliency: Tensor) -> list[Reordered]:
        """Order the channels by the reader's saliency, float32 (out, in); [] where they are best left as they are."""
        by_head = saliency.view(-1, self.heads, self.repeats, self.width)
        # One query head's rows after another's: `order_channels` looks at some rows, spread over all of them.
        rows = by_head.permute(1, 2, 0, 3).flatten(1, 2)
        orders = torch.stack([order_channels(of_head, self.pattern).cpu() for of_head in rows])
        if orders.equal(torch.arange(self.width).expand_as(orders)):
            return []
        first = torch.arange(self.heads * self.repeats).view(self.heads, self.repeats, 1) * self.width
        read = (first + orders.unsqueeze(1)).flatten()
        written = (torch.arange(self.heads).unsqueeze(1) * self.width + orders).flatten()
        if self.repeats == self.channels.parts == 1:
            return [Reordered(tensors=self.written | self.read, order=tuple(written.tolist()))]
        parts = torch.arange(self.channels.parts).unsqueeze(1) * len(written)
        return [
            Reordered(tensors=self.written, order=tuple((parts + written).flatten().tolist())),
            Reordered(tensors=self.read, order=tuple(read.tolist())),
        ]


def movable_channels(initial_masks: InitialMasks) -> list[list[MovableChannels]]:
    """Channels of each layer that may change places, and whose reader is pruned to N:M.

    Left out are channels of tensors that hold several weights or have several names, and of rows or heads that M does
    not divide.
    """
    return [_movable_in_layer(initial_masks, index) for index in range(initial_masks.job.layer_count)]


def _movable_in_layer(initial_masks: InitialMasks, index: int) -> list[MovableChannels]:
    job, patterns = initial_masks.job, initial_masks.patterns(index)
    movable_here = []
    for channels in job.architecture.channels:
        linears = (*channels.writers, channels.reader)
        if channels.reader not in patterns or not set(linears) <= set(job.linears(index)):
            continue
        if any(job.skeleton.other_names(index, name) for name in linears):
            continue
        movable = _movable(job, index, channels, patterns[channels.reader])
        if movable is not None:
            movable_here.append(movable)
    return movable_here


def _movable(job: Job, index: int, channels: Channels, pattern: NofM) -> MovableChannels | None:
    """Sizes and tensors of some channels; None: they may not change places.

    They may not if a tensor holds several weights, M does not divide a row or head, or the sizes do not fit the heads.
    """
    names = set(job.skeleton.layer_names(index))
    written_dim, read_dim = (1, 0) if job.architecture.transposed else (0, 1)
    written = {f"{name}.weight": written_dim for name in channels.writers}
    written |= {f"{name}.bias": 0 for name in channels.writers if f"{name}.bias" in names}
    read = {f"{channels.reader}.weight": read_dim}
    prefix = job.skeleton.layer_prefix(index)
    locations = {name: job.source.location(prefix + name) for name in (*written, *read)}
    if any(location.part is not None for location in locations.values()):
        return None
    (outputs,) = {job.source.shape(prefix + name)[dim] for name, dim in written.items()}
    size = outputs // channels.parts
    inputs = job.source.shape(f"{prefix}{channels.reader}.weight")[read_dim]
    heads = query_heads = 1
    if channels.of_heads:
        query_heads = job.config.num_attention_heads
        heads = getattr(job.config, "num_key_value_heads", None) or query_heads
        if not isinstance(query_heads, int) or not isinstance(heads, int):  # layers with numbers of their own
            return None
    if outputs % channels.parts or size % heads or size // heads % pattern.of or inputs * heads != size * query_heads:
        return None
    return MovableChannels(
        channels,
        pattern,
        heads,
        width=size // heads,
        repeats=query_heads // heads,
        written={locations[name].tensor: dim for name, dim in written.items()},
        read={locations[name].tensor: dim for name, dim in read.items()},
    )
