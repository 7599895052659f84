"""Gradients of losses at the linears of a decoder layer: squared sequence by sequence, summed, or by their outputs."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from llm_barber.masking.gradient_squares import FisherSums, GradientSquares
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import (
    LinearCall,
    LinearGradients,
    differences,
    linear_gradients,
    mean_squares,
    scaled_by_sequence,
)


def block_gradients(
    layer: DecoderLayer,
    block: Block,
    hidden: Tensor,
    sparse_output: Tensor,
    replays: Mapping[str, Tensor],
    squares: Mapping[str, GradientSquares],
) -> tuple[Tensor, Tensor]:
    """Add the squared per-sequence gradients of the reconstruction error at the layer's present weights.

    The loss of a sequence is mean((y − y_sparse)²) over its tokens and channels (arXiv 2408.10631).
    Autograd forms no gradient of a weight, since that would sum over the batch. It forms the gradients by the
    outputs of the linears; the weight gradient of a sequence is their product with the sequence's inputs.

    Args:
        layer: the decoder layer.
        block: the block.
        hidden: the layer's input, (sequences, tokens, hidden).
        sparse_output: the block's output with the pruned weights, (sequences, tokens, hidden).
        replays: as in `DecoderLayer.block_output`.
        squares: running sums of the block's linears, to which the squares are added.

    Returns:
        The block's output y, (sequences, tokens, hidden), detached, and the losses, float32 (sequences,).

    Raises:
        ModelError: y does not depend on a linear.
    """
    outputs: list[Tensor] = []
    stop, replay = layer.hooks.stop_at(block, outputs, len(hidden)), layer.hooks.replayed(replays)
    with torch.enable_grad():
        with layer.hooks.recorded(block.linears) as calls, stop, replay:
            layer.run(hidden)
        output = outputs[0].detach()
        difference = differences(output, sparse_output)
        scaled, scale = scaled_by_sequence(difference, output.dtype)
        gradients = torch.autograd.grad(outputs[0], [call.output for call in calls], scaled, allow_unused=True)
    factor = 2 / difference[0].numel()  # d mean(d²)/dy = 2 d / (tokens · channels)
    for name, inputs, by_output in linear_gradients(calls, gradients, len(hidden), block.output):
        squares[name].update(inputs, by_output, scale, factor)
    return output, mean_squares(difference)


def loss_gradients(layer: DecoderLayer, hidden: Tensor, gradient: Tensor, sums: Mapping[str, FisherSums]) -> Tensor:
    """Propagate the gradient of a loss back through the layer, and add its sums at the linears.

    Args:
        layer: the decoder layer.
        hidden: the layer's input, (sequences, tokens, hidden).
        gradient: the gradient by the layer's output, float32, (sequences, tokens, hidden).
        sums: running sums of the linears, to which the gradients are added.

    Returns:
        The gradient by `hidden`, float32, (sequences, tokens, hidden).

    Raises:
        ModelError: the output does not depend on a linear.
    """
    hidden = hidden.detach().requires_grad_()
    calls, scale, (by_hidden, *gradients) = _backward(
        layer, lambda: layer.run(hidden), layer.linears, lambda _: gradient, hidden
    )
    for name, inputs, by_output in linear_gradients(calls, gradients, len(hidden), "the decoder layer"):
        sums[name].update(inputs, by_output, scale)
    assert by_hidden is not None
    return by_hidden.float() * scale.view(-1, 1, 1)


def output_gradients(
    layer: DecoderLayer, weights: Mapping[str, Tensor], hidden: Tensor, gradient: Callable[[Tensor], Tensor]
) -> tuple[list[LinearGradients], Tensor]:
    """Inputs of linears, and gradients of a loss by the linears' outputs, with other weights of the layer.

    Args:
        layer: the decoder layer.
        weights: weights of these linears, as in `DecoderLayer.output_with`. A linear that the loss does not depend on
            is left out of the result.
        hidden: the layer's input, (sequences, tokens, hidden).
        gradient: takes the layer's output, detached; returns the gradient of the loss by it, float32. Both are
            (sequences, tokens, hidden).

    Returns:
        Inputs and gradients, which are divided by a scale; and the scale of each sequence, float32 (sequences,).
    """
    calls, scale, gradients = _backward(layer, lambda: layer.output_with(weights, hidden), weights, gradient)
    return linear_gradients(calls, gradients, len(hidden)), scale


def _backward(
    layer: DecoderLayer,
    compute: Callable[[], Tensor | None],
    linears: Collection[str],
    gradient: Callable[[Tensor], Tensor],
    *further: Tensor,
) -> tuple[list[LinearCall], Tensor, tuple[Tensor | None, ...]]:
    """Run the whole layer and go back: calls of linears, scales, gradients by `further` tensors and by the outputs.

    `compute` runs the layer; scales and `gradient` are as in `output_gradients`.
    """
    with torch.enable_grad():
        with layer.hooks.recorded(linears) as calls:
            output = compute()
        assert output is not None
        scaled, scale = scaled_by_sequence(gradient(output.detach()), output.dtype)
        tensors = [*further, *(call.output for call in calls)]
        return calls, scale, torch.autograd.grad(output, tensors, scaled, allow_unused=True)
