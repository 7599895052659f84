"""Scores of weights: what scores higher stays. All take and give tensors of shape (out, in); scores are float32."""

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


def weight_gradient(weight: Tensor, gradient_squares: Tensor) -> Tensor:
    """S = |W| · sqrt(mean over sequences of G²) (LLM-Barber, arXiv 2408.10631, equation 7).

    Args:
        weight: (out, in).
        gradient_squares: (out, in), float32.
    """
    return weight.float().abs() * gradient_squares.sqrt()
