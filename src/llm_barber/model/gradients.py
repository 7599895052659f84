"""Reconstruction errors, and gradients of losses at the linears of a decoder layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_barber.errors import ModelError, NotFiniteError
from llm_barber.masking.gradient_squares import FisherSums, GradientSquares
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.hooks import LinearCall, by_sequence


class LinearGradients(NamedTuple):
    """Inputs of a linear, (sequences, tokens, in), and gradients by its output, (sequences, tokens, out)."""

    name: str
    inputs: Tensor
    gradients: Tensor


def reconstruction_errors(dense: Tensor, output: Tensor) -> Tensor:
    """mean((y_dense − y)²) over tokens and channels of each sequence (arXiv 2408.10631).

    Takes outputs of shape (sequences, tokens, hidden); returns float32 of shape (sequences,).
    """
    return mean_squares(differences(dense, output))


def differences(left: Tensor, right: Tensor) -> Tensor:
    """left − right, float32; a GPU converts `right` as it reads it."""
    return left.float() - right


def linear_gradients(
    calls: Sequence[LinearCall], gradients: Sequence[Tensor | None], sequences: int, module: str | None = None
) -> list[LinearGradients]:
    """Inputs of linears, and gradients by their outputs.

    Several calls of a linear follow each other as more tokens; a call without a gradient is left out.

    Args:
        calls: the calls of the linears.
        gradients: the gradient by the output of each call; None: the loss does not depend on it.
        sequences: number of sequences of each call.
        module: the module whose output the gradients are of, for the error; None: a linear without a gradient is left
            out.

    Raises:
        ModelError: no call of some linear has a gradient, and `module` is given.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            pair = by_sequence(call.inputs, sequences), by_sequence(gradient, sequences)
            parts.setdefault(call.name, []).append(pair)
    for call in calls:
        if call.name not in parts and module is not None:
            raise ModelError(f"the output of {module} has no gradient by {call.name}", f"--exclude '{call.name}$'")
    return [
        LinearGradients(name, *(pairs[0] if len(pairs) == 1 else map(_joined, zip(*pairs, strict=True))))
        for name, pairs in parts.items()
    ]


def _joined(calls: Sequence[Tensor]) -> Tensor:
    """Join tensors of several calls, (sequences, tokens, features), along the tokens."""
    return torch.cat(list(calls), 1)


def scaled_by_sequence(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale each sequence to at most 1, so that nothing underflows in half precision.

    Args:
        gradient: float32, (sequences, tokens, hidden).
        dtype: the dtype to convert to.

    Returns:
        The scaled gradient, and the scale of each sequence, float32 (sequences,): a power of two, so that scaling is
        exact.
    """
    peak = torch.linalg.vector_norm(gradient, torch.inf, dim=(1, 2))
    scale = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
    scaled = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.div(gradient, scale.view(-1, 1, 1), out=scaled), scale


def mean_squares(values: Tensor) -> Tensor:
    """Mean square over tokens and channels, (sequences,), without an array of squares."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=(1, 2))
    return norms.square_() / values[0].numel()


def check_finite(gradients: Mapping[str, Tensor], where: str) -> None:
    """Refuse gradients by the weights of a layer's linears that hold NaN or Inf; a GPU is waited for once.

    Args:
        gradients: gradients of any shape, of one dtype, by linear.
        where: the layer's name in messages.

    Raises:
        NotFiniteError: a gradient does; the error names the first of them.
    """
    finite = torch.isfinite(torch.stack([gradient.sum() for gradient in gradients.values()]))
    if not finite.all():
        name = list(gradients)[int(finite.int().argmin())]
        raise NotFiniteError(
            f"a gradient of {where}, {name}, holds NaN or Inf on the calibration text",
            "use --dtype bfloat16 or float32, or do without gradients: --refine swaps, or none",
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
