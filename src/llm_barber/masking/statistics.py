"""Running sums over the calibration sequences; those of inputs: squares, mean and variance of each channel.

Sums are float32 whatever the activations' dtype. They are added sequence by sequence in a fixed order, so that the
batch size does not change them. Small sums, one number per channel, are float64, so that the number of processes
hardly changes them. Other sums are in `gram.py` and `gradient_squares.py`.
"""

import torch
from torch import Tensor


class RunningSums:
    """Sums over calibration sequences; processes that share the sequences add up their `parts`."""

    def parts(self) -> list[Tensor]:
        """List every sum, and every count, a float64 tensor (1,)."""
        parts: list[Tensor] = []
        for value in vars(self).values():
            if isinstance(value, RunningSums):
                parts += value.parts()
            elif isinstance(value, Tensor):
                parts.append(value)
        return parts


def new_count() -> Tensor:
    """A count of zero; a tensor, so that processes can add it up."""
    return torch.zeros(1, dtype=torch.float64)


class InputSquares(RunningSums):
    """Mean over sequences of the squared norm of each input channel (Wanda, arXiv 2306.11695, equation 1).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.sequences = new_count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences."""
        for sequence in inputs:
            if sequence.device.type != "cpu":  # one pass over the inputs instead of three
                self.total += torch.linalg.vector_norm(sequence, dim=0, dtype=torch.float32).square()
                continue
            values = sequence.float()
            squares = values.square() if sequence.dtype == torch.float32 else values.square_()  # a copy may change
            self.total += squares.sum(0)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean squared norm of each channel, float32 (in,)."""
        return (self.total / self.sequences.item()).float()


class InputMoments(RunningSums):
    """Sums for DSnoT's mean and variance of each input channel (arXiv 2310.08915).

    They are its released program's, not those over all tokens: `mean` is of sums over a sequence's tokens, `variance`
    is within sequences.

    `update` takes inputs of shape (sequences, tokens, in); all properties are float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares = InputSquares(features, device)
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.explained = torch.zeros(features, device=device, dtype=torch.float64)
        self.tokens = new_count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences."""
        self.squares.update(inputs)
        for sequence, tokens in zip(inputs, (inputs != 0).any(-1).sum(1).tolist(), strict=True):
            total = sequence.float().sum(0)
            self.total += total
            self.explained += total.double().square() / max(tokens, 1)
            self.tokens += tokens  # without the zeros that pad the inputs of experts

    @property
    def mean(self) -> Tensor:
        """Mean over sequences of the sum over tokens."""
        return (self.total / self.squares.sequences.item()).float()

    @property
    def variance(self) -> Tensor:
        """Variance within sequences, mean over tokens, as in DSnoT's released program."""
        return ((self.squares.total - self.explained) / max(self.tokens.item(), 1)).clamp_min(0).float()
