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
    results = {}
    for name, inputs, gradients in parts:
        # The root of s scales both factors of a term: s itself could underflow in float16.
        root = _root_factors(inputs, gradients)
        results[name] = weight_gradients((gradients * root).flatten(0, 1), (inputs * root).flatten(0, 1))
    return results


def _root_factors(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Root of the factor s of each token, (sequences, tokens, 1), in the gradients' dtype.

    Tokens without a gradient, and the zeros that pad the inputs of experts, are left out of the median.
    """
    sizes = _norms(inputs) * _norms(gradients)
    bound = HUGE_TERM * torch.where(sizes > 0, sizes, torch.nan).nanmedian(-1, keepdim=True).values
    # Without any gradient the bound is NaN, and nothing is scaled.
    return torch.where(sizes > bound, (bound / sizes).sqrt(), 1.0).unsqueeze(-1).to(gradients.dtype)


def _norms(values: Tensor) -> Tensor:
    """Norm of each token's values, float32."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return norms
