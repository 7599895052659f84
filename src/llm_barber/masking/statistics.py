"""Running sums over the calibration sequences: squares of inputs, Gram matrices, squares of gradients.

All are float32 whatever the activations' dtype, and are added sequence by sequence in a fixed order, so that the
batch size does not change them. Those that are small, a number a channel, are added up in float64, so that the number
of processes hardly does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_half_products(dtype: torch.dtype) -> Iterator[None]:
    """Within, float32 matrices whose values came as `dtype` are multiplied in a form that holds these exactly.

    CPUs multiply as bfloat16, GPUs as TF32, which holds float16, too, and both add up in float32: nothing is rounded
    but the sums, and products take a half to an eighth of the time where the processor has such products.
    """
    forms = {torch.bfloat16: {"mkldnn": "bf16", "cuda": "tf32"}, torch.float16: {"cuda": "tf32"}}.get(dtype, {})
    with ExitStack() as stack:
        for backend, form in forms.items():
            settings: Any = getattr(getattr(torch.backends, backend), "matmul", None)
            if hasattr(settings, "fp32_precision"):  # not before torch 2.9
                stack.callback(setattr, settings, "fp32_precision", settings.fp32_precision)
                settings.fp32_precision = form
        yield


class RunningSums:
    """Sums over calibration sequences; processes that share the sequences add up their `parts`."""

    def parts(self) -> list[Tensor]:
        """Every sum, and every count as a float64 tensor (1,)."""
        found: list[Tensor] = []
        for value in vars(self).values():
            found += value.parts() if isinstance(value, RunningSums) else [value] if isinstance(value, Tensor) else []
        return found


def _count() -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


class InputSquares(RunningSums):
    """Mean over sequences of the squared norm of each input channel (Wanda, arXiv 2306.11695, equation 1).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.sequences = _count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences."""
        for sequence in inputs:
            self.total += sequence.float().square().sum(0)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """float32, (in,)."""
        return (self.total / self.sequences.item()).float()


class InputMoments(RunningSums):
    """Sums of each input channel, for methods that look at its mean and variance (DSnoT, arXiv 2310.08915).

    `update` takes inputs of shape (sequences, tokens, in); all properties are float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares = InputSquares(features, device)
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.explained = torch.zeros(features, device=device, dtype=torch.float64)
        self.tokens = _count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences."""
        self.squares.update(inputs)
        for sequence, tokens in zip(inputs, (inputs != 0).any(-1).sum(1).tolist(), strict=True):
            total = sequence.float().sum(0)
            self.total += total
            self.explained += total.double().square() / max(tokens, 1)
            self.tokens += tokens  # experts' inputs are padded with zeros

    @property
    def mean(self) -> Tensor:
        """Mean over sequences of the sum over tokens."""
        return (self.total / self.squares.sequences.item()).float()

    @property
    def variance(self) -> Tensor:
        """Variance within sequences, mean over tokens, as the released program of DSnoT has it."""
        return ((self.squares.total - self.explained) / max(self.tokens.item(), 1)).clamp_min(0).float()


# Into how many panels of rows a Gram matrix is cut, and the least of their rows.
PANELS, LEAST_PANEL = 8, 64


def panels(features: int) -> list[slice]:
    """The rows of a Gram matrix, (features, features), in panels; of each only what stands from its start on is summed.

    The matrix is symmetric: with eight panels, 9/16 of its products are made, and `mirrored` has the others from them.
    """
    size = max(LEAST_PANEL, -(-features // PANELS))
    return [slice(first, min(first + size, features)) for first in range(0, features, size)]


def add_products(total: Tensor, values: Tensor) -> None:
    """Add Σ x xᵀ over the rows x of `values`, float32 (tokens, in), to the panels of `total`, float32 (in, in)."""
    for rows in panels(len(total)):
        total[rows, rows.start :].addmm_(values[:, rows].t(), values[:, rows.start :])


def gram_flops(tokens: float, features: int) -> float:
    """FLOPs of `add_products`."""
    places: int = sum((rows.stop - rows.start) * (features - rows.start) for rows in panels(features))
    return 2 * tokens * places


def mirrored(total: Tensor) -> Tensor:
    """A sum of `add_products`, made whole in place."""
    for rows in panels(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].t()
    return total


class GramMatrix(RunningSums):
    """H = 2/n · Σ x xᵀ over all tokens of n sequences (SparseGPT, arXiv 2301.00774).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in, in).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, features, device=device)
        self.sequences = _count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences: products in float32, since rounded ones are not positive definite."""
        with exact_half_products(inputs.dtype):
            for sequence in inputs:
                add_products(self.total, sequence.float())
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """float32, (in, in)."""
        return mirrored(self.total * (2 / self.sequences.item()))


class TargetMoments(RunningSums):
    """What the error of a linear on its sparse inputs depends on, when its target is the output on other inputs.

    `gram` = Σ x xᵀ / n and `difference` = Σ (x − x′) xᵀ / n over all n tokens, x an input in the sparse model and x′
    the same one in the dense model; both float32, (in, in). The linear term of `swaps.py` for a target between the
    outputs on x (mix 0) and on x′ (mix 1) is L = mix · W · difference.
    """

    def __init__(self, features: int, device: torch.device, crossed: bool = True) -> None:
        self._gram = torch.zeros(features, features, device=device)
        self._crossed = torch.zeros_like(self._gram) if crossed else None
        self.tokens = _count()

    def update(self, inputs: Tensor, others: Tensor | None) -> None:
        """Add a batch, (sequences, tokens, in); `others` are x′, None: they are x, and it was made not `crossed`."""
        with exact_half_products(inputs.dtype):
            for index, sequence in enumerate(inputs):
                values = sequence.float()
                add_products(self._gram, values)
                if others is not None and self._crossed is not None:
                    self._crossed.addmm_(others[index].float().t(), values)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    @property
    def gram(self) -> Tensor:
        """float32, (in, in)."""
        return mirrored(self._gram / self.tokens.item())

    @property
    def difference(self) -> Tensor:
        """float32, (in, in)."""
        if self._crossed is None:
            return torch.zeros_like(self._gram)
        return mirrored(self._gram.clone()).sub_(self._crossed).div_(self.tokens.item())


class GradientSquares(RunningSums):
    """Mean over sequences of the squared gradient of a weight (arXiv 2408.10631).

    The gradient of one sequence is `output_gradientᵀ · inputs`, the square is taken before sequences are added.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self.sequences = _count()

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in).
            output_gradient: (sequences, tokens, out), each sequence divided by its `scale`.
            scale: (sequences,), float32.
        """
        for sequence, gradient, factor in zip(inputs, output_gradient, scale.tolist(), strict=True):
            if gradient.dtype == torch.float16:  # a sum over tokens can pass its largest number, 65504
                sequence, gradient = sequence.float(), gradient.float()
            weight_gradient = (gradient.t() @ sequence).float()
            self.total.addcmul_(weight_gradient, weight_gradient, value=factor * factor)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """float32, (out, in)."""
        return self.total / self.sequences.item()


class FisherSums(RunningSums):
    """Sums of the Fisher information of a linear's weights, over its columns and over its rows.

    The information of a weight is Σ (g x)² over tokens, g the gradient of the loss by its output and x its input.
    `rows`, float64 (out,), is its sum over inputs, Σ g² ‖x‖²; `columns`, float64 (in,), over outputs, Σ ‖g‖² x².
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.rows = torch.zeros(shape[0], device=device, dtype=torch.float64)
        self.columns = torch.zeros(shape[1], device=device, dtype=torch.float64)

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in).
            output_gradient: (sequences, tokens, out), each sequence divided by its `scale`.
            scale: (sequences,), float32.
        """
        for sequence, gradient, factor in zip(inputs, output_gradient, scale.tolist(), strict=True):
            x, g = sequence.float().square(), (gradient.float() * factor).square()
            self.rows += x.sum(1) @ g
            self.columns += g.sum(1) @ x
