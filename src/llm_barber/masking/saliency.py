"""Scores of weights, float32 (out, in): the weights with the higher scores stay."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """S = |W|."""
    return weight.float().abs()


def wanda(weight: Tensor, input_squares: Tensor) -> Tensor:
    """S = |W| · ‖X‖₂, the norm of each input channel (Wanda, arXiv 2306.11695, equation 1).

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.
    """
    return weight.float().abs() * input_squares.sqrt()


def relative_importance(weight: Tensor, input_squares: Tensor) -> Tensor:
    """S = (|W| / sum of |W| in its column + |W| / sum of |W| in its row) · ‖X‖₂^0.5 (RIA, ICLR 2024).

    Args:
        weight: (out, in).
        input_squares: (in,), float32, the mean squared norm of each input channel.
    """
    size = weight.float().abs()
    # The weights of a row or column of zeros score 0.
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative * input_squares.sqrt().pow(0.5)


def weight_gradient(weight: Tensor, gradient_squares: Tensor) -> Tensor:
    """S = |W| · sqrt(mean over sequences of G²) (LLM-Barber, arXiv 2408.10631).

    Args:
        weight: (out, in).
        gradient_squares: (out, in), float32.
    """
    return weight.float().abs() * gradient_squares.sqrt()
