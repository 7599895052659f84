"""Reconstruction errors of outputs, and gradients by the outputs of linears."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_barber.errors import ModelError, NotFiniteError


class LinearCall(NamedTuple):
    """One call of a linear: its inputs, detached, (…, in), and its output, (…, out), in the graph."""

    name: str
    inputs: Tensor
    output: Tensor


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
            "use --dtype bfloat16 or float32, or do without gradients: --refine swaps, or none",
        )
