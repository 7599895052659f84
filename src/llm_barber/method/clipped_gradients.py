"""Gradients by the weights of linears, in which no token has a huge term.

A linear's gradient is a sum over tokens, Σ g xᵀ, with g the gradient of the loss by the output and x the input of a
token. In models with an attention sink one token can have most of that sum, in which the other tokens' gradients are
then lost. So a huge term is scaled down. The gradient by the linear's input, which goes on to earlier linears, is not
scaled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_barber.masking.gradient_squares import weight_gradients
from llm_barber.model.gradients import LinearGradients

# A token whose term g xᵀ exceeds `HUGE_TERM` times the median token's, in Frobenius norm, counts as that large.
HUGE_TERM = 10.0


def clipped_gradients_by_weights(parts: Sequence[LinearGradients]) -> dict[str, Tensor]:
    """Gradients by the weights of linears, Σ s g xᵀ over the tokens of all sequences, with huge terms scaled down.

    s = min(1, HUGE_TERM · median(‖g‖ ‖x‖) / (‖g‖ ‖x‖)), with the lower median over the tokens of a sequence that reach
    the linear, in all of its calls.

    Returns:
        (out, in), by linear, in the dtype of `weight_gradients`.
    """
    results: dict[str, Tensor] = {}
    for part, root in zip(parts, _root_factors(parts), strict=True):
        # The root of s scales both factors of a term: s itself could underflow in float16.
        gradients, inputs = (part.gradients * root).flatten(1, 2), (part.inputs * root).flatten(1, 2)
        if len(part.names) == 1:  # a CPU multiplies two matrices faster than two stacks of one matrix
            results[part.names[0]] = weight_gradients(gradients[0], inputs[0])
        else:
            results |= zip(part.names, weight_gradients(gradients, inputs).unbind(0), strict=True)
    return results


def _root_factors(parts: Sequence[LinearGradients]) -> list[Tensor]:
    """Root of the factor s of each token, (linears, sequences, tokens, 1), in the gradients' dtype, for each part.

    Parts of the same numbers of sequences and tokens are computed together: a GPU takes longer to start than to compute
    them. Tokens without a gradient, and the zeros that pad the inputs of experts, are left out of the median.
    """
    sizes = [_norms(part.inputs) * _norms(part.gradients) for part in parts]
    roots: dict[int, Tensor] = {}
    for shape in {of_part.shape[1:] for of_part in sizes}:
        alike = [index for index, of_part in enumerate(sizes) if of_part.shape[1:] == shape]
        joined = torch.cat([sizes[index] for index in alike])
        bound = HUGE_TERM * torch.where(joined > 0, joined, torch.nan).nanmedian(-1, keepdim=True).values
        # Without any gradient the bound is NaN, and nothing is scaled.
        root = torch.where(joined > bound, (bound / joined).sqrt(), 1.0).unsqueeze(-1)
        of_parts = torch.split(root.to(parts[alike[0]].gradients.dtype), [len(parts[index].names) for index in alike])
        roots |= zip(alike, of_parts, strict=True)
    return [roots[index] for index in range(len(parts))]


def _norms(values: Tensor) -> Tensor:
    """Norm of each token's values, float32."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return norms
