"""Scores of weights: what scores higher stays. All take and give tensors of shape (out, in); scores are float32."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """S = |W|."""
    return weight.float().abs()


def wanda(weight: Tensor, input_squares: Tensor) -> Tensor:
    """S = |W| · ‖X‖₂, by input channel (Wanda, arXiv 2306.11695, equation 1).

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.
    """
    return weight.float().abs() * input_squares.sqrt()


def relative_importance(weight: Tensor, input_squares: Tensor, exponent: float = 0.5) -> Tensor:
    """S = (|W| / column's sum of |W| + |W| / row's sum of |W|) · ‖X‖₂ᵃ (RIA, ICLR 2024).

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.
        exponent: a.
    """
    size = weight.float().abs()
    # A row or column of zeros has nothing to compare: its weights score 0.
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * input_squares.sqrt().pow(exponent)


def weight_gradient(weight: Tensor, gradient_squares: Tensor) -> Tensor:
    """S = |W| · sqrt(mean over sequences of G²) (LLM-Barber, arXiv 2408.10631).

    Args:
        weight: (out, in).
        gradient_squares: (out, in), float32.
    """
    return weight.float().abs() * gradient_squares.sqrt()
