"""Reconstruction errors of outputs, and gradients by the outputs of linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.errors import ModelError, NotFiniteError


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear: its input, detached, and its output, in the graph."""

    name: str
    inputs: Tensor
    output: Tensor


def reconstruction_errors(dense: Tensor, output: Tensor) -> Tensor:
    """mean((y_dense − y)²) over tokens and channels of each sequence (arXiv 2408.10631).

    Takes outputs of shape (sequences, tokens, hidden); returns float32 of shape (sequences,).
    """
    return mean_squares(dense.float() - output.float())


def by_linear(
    calls: list[LinearCall], gradients: Sequence[Tensor | None], sequences: int, module: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs, and gradients by the outputs, of each linear, both (sequences, tokens, features).

    Several calls of a linear follow each other as more tokens; a call without a gradient is left out.

    Args:
        calls: the calls of the linears.
        gradients: the gradient by the output of each call; None: the loss does not depend on it.
        sequences: number of sequences.
        module: the module whose output the gradients are of, for the error.

    Raises:
        ModelError: no call of some linear has a gradient.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            pair = by_sequence(call.inputs, sequences), by_sequence(gradient, sequences)
            pairs.setdefault(call.name, []).append(pair)
    for call in calls:
        if call.name not in pairs:
            raise ModelError(f"the output of {module} has no gradient by {call.name}", f"--exclude '{call.name}$'")
    return {name: _join_tokens(of_linear) for name, of_linear in pairs.items()}


def _join_tokens(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join inputs and gradients of several calls along the tokens."""
    if len(pairs) == 1:
        return pairs[0]
    inputs, gradients = zip(*pairs, strict=True)
    return torch.cat(inputs, 1), torch.cat(gradients, 1)


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
    return (gradient / scale.view(-1, 1, 1)).to(dtype), scale


def mean_squares(values: Tensor) -> Tensor:
    """Mean square over tokens and channels, (sequences,), without an array of squares."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=(1, 2))
    return norms.square_() / values[0].numel()


def by_sequence(activations: Tensor, sequences: int) -> Tensor:
    """Reshape to (sequences, tokens, features); some layers flatten to (sequences · tokens, features)."""
    return activations.reshape(sequences, -1, activations.shape[-1])


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
            "compute with a wider range: --dtype bfloat16 or float32; or --refine swaps, or none",
        )
