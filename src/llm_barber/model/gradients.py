"""Reconstruction errors of outputs, and gradients by the outputs of linears."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llm_barber.errors import ModelError, NotFiniteError


class Rows(NamedTuple):
    """Values of linears, (linears, sequences, tokens, features), and their names; None: a linear that is left out."""

    names: tuple[str | None, ...]
    values: Tensor


Splitter = Callable[[Tensor], list[Rows]]


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear, or of the same linear of several experts.

    Attributes:
        inputs: (rows, in) or (sequences, tokens, in), detached.
        output: the output, in the graph.
        split: splits such inputs, or gradients by the output, into `Rows`.
    """

    inputs: Tensor
    output: Tensor
    split: Splitter


@dataclass(frozen=True)
class LinearGradients:
    """Inputs of linears, (linears, sequences, tokens, in), and gradients by their outputs, (…, out)."""

    names: tuple[str, ...]
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
    calls: Sequence[LinearCall], gradients: Sequence[Tensor | None], module: str | None = None
) -> list[LinearGradients]:
    """Inputs of linears, and gradients by their outputs; linears that were called together are together.

    Several calls of a linear follow each other as more tokens; a call without a gradient is left out.

    Args:
        calls: the calls of the linears.
        gradients: the gradient by the output of each call; None: the loss does not depend on it.
        module: the module whose output the gradients are of, for the error; None: a linear without a gradient is left
            out.

    Raises:
        ModelError: no call of some linear has a gradient, and `module` is given.
    """
    parts: list[LinearGradients] = []
    missing: list[str] = []
    for call, gradient in zip(calls, gradients, strict=True):
        inputs = call.split(call.inputs)
        if gradient is None:
            missing += [name for rows in inputs for name in rows.names if name is not None]
        else:
            chosen = map(_chosen, inputs, call.split(gradient))
            parts += [part for part in chosen if part.names]
    counts = Counter(name for part in parts for name in part.names)
    for name in missing:
        if name not in counts and module is not None:
            raise ModelError(f"the output of {module} has no gradient by {name}", f"--exclude '{name}$'")
    return parts if not counts or max(counts.values()) == 1 else _join_calls(parts)


def _chosen(inputs: Rows, gradients: Rows) -> LinearGradients:
    """Inputs and gradients of the linears that have a name."""
    chosen = [index for index, name in enumerate(inputs.names) if name is not None]
    names = tuple(name for name in inputs.names if name is not None)
    if len(names) == len(inputs.names):
        return LinearGradients(names, inputs.values, gradients.values)
    return LinearGradients(names, inputs.values[chosen], gradients.values[chosen])


def _join_calls(parts: Sequence[LinearGradients]) -> list[LinearGradients]:
    """Take linears apart, and join the calls of each along the tokens."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in parts:
        for index, name in enumerate(part.names):
            pair = part.inputs[index : index + 1], part.gradients[index : index + 1]
            pairs.setdefault(name, []).append(pair)
    joined = {
        name: [torch.cat(tensors, 2) for tensors in zip(*of_linear, strict=True)] for name, of_linear in pairs.items()
    }
    return [LinearGradients((name,), inputs, gradients) for name, (inputs, gradients) in joined.items()]


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
