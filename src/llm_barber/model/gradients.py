"""From outputs of a layer's run: reconstruction errors, and gradients by the outputs of its linears."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_barber.errors import ModelError


@dataclass(frozen=True)
class Ends:
    """The input, detached, and the output, in the graph, of a call of a linear."""

    name: str
    inputs: Tensor
    output: Tensor


def reconstruction_errors(dense: Tensor, other: Tensor) -> Tensor:
    """mean((y_dense − y)²) over tokens and channels of each sequence (arXiv 2408.10631).

    Takes (sequences, tokens, hidden), gives float32 of shape (sequences,).
    """
    return mean_squares(dense.float() - other.float())


def by_linear(
    ends: list[Ends], gradients: Sequence[Tensor | None], sequences: int, of: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs, and gradients of the outputs, (sequences, tokens, features), by linear.

    Of several calls they follow each other as tokens; a call whose output has no gradient is left out.

    Raises:
        ModelError: no call of a linear has one; `of` is whose output that is.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for end, gradient in zip(ends, gradients, strict=True):
        if gradient is not None:
            both = by_sequence(end.inputs, sequences), by_sequence(gradient, sequences)
            calls.setdefault(end.name, []).append(both)
    for end in ends:
        if end.name not in calls:
            raise ModelError(f"the output of {of} has no gradient by {end.name}", f"--exclude '{end.name}$'")
    return {name: _joined(found) for name, found in calls.items()}


def _joined(calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(calls) == 1:
        return calls[0]
    inputs, gradients = zip(*calls, strict=True)
    return torch.cat(inputs, 1), torch.cat(gradients, 1)


def scaled_by_sequence(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sequence scaled to at most 1, so that nothing underflows in half precision; and the scale, float32.

    It is a power of two, so that this is exact. Takes float32 (sequences, tokens, hidden).
    """
    peak = torch.linalg.vector_norm(gradient, torch.inf, dim=(1, 2))
    scale = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
    return (gradient / scale.view(-1, 1, 1)).to(dtype), scale


def mean_squares(values: Tensor) -> Tensor:
    """Mean over tokens and channels of the squares, (sequences,), without an array of squares."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=(1, 2))
    return norms.square_() / values[0].numel()


def by_sequence(activations: Tensor, sequences: int) -> Tensor:
    """(sequences, tokens, features) from activations that some layers flatten to (sequences · tokens, features)."""
    return activations.reshape(sequences, -1, activations.shape[-1])
