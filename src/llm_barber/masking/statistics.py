"""Running sums over the calibration sequences: squares of inputs, Gram matrices, squares of gradients.

Sums are float32 whatever the activations' dtype. They are added sequence by sequence in a fixed order, so that the
batch size does not change them. Small sums, one number per channel, are float64, so that the number of processes
hardly changes them.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_barber.gpu.steps import add_squares as add_squares_in_turn
from llm_barber.masking.by_rows import add_squares


@contextmanager
def exact_half_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices in a faster format that represents values of `dtype` exactly.

    The values of the matrices came as `dtype`. CPUs multiply as bfloat16, GPUs as TF32, which also represents float16.
    Both add up in float32, so that only the sums are rounded. On processors with such products they take an eighth to
    a half of the time.
    """
    formats = {torch.bfloat16: {"mkldnn": "bf16", "cuda": "tf32"}, torch.float16: {"cuda": "tf32"}}.get(dtype, {})
    with float32_products(formats):
        yield


@contextmanager
def float32_products(formats: Mapping[str, str]) -> Iterator[None]:
    """Multiply float32 matrices in these formats, by PyTorch's backend: "ieee" (exact), "tf32" or "bf16"."""
    with ExitStack() as stack:
        for backend, precision in formats.items():
            settings: Any = getattr(torch.backends, backend).matmul
            stack.callback(setattr, settings, "fp32_precision", settings.fp32_precision)
            settings.fp32_precision = precision
        yield


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


def _new_count() -> Tensor:
    """A count of zero; a tensor, so that processes can add it up."""
    return torch.zeros(1, dtype=torch.float64)


class InputSquares(RunningSums):
    """Mean over sequences of the squared norm of each input channel (Wanda, arXiv 2306.11695, equation 1).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.sequences = _new_count()

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
    """Sums for the mean and the variance of each input channel (DSnoT, arXiv 2310.08915).

    `update` takes inputs of shape (sequences, tokens, in); all properties are float32 of shape (in,).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares = InputSquares(features, device)
        self.total = torch.zeros(features, device=device, dtype=torch.float64)
        self.explained = torch.zeros(features, device=device, dtype=torch.float64)
        self.tokens = _new_count()

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


# A Gram matrix is cut into this many panels of rows; a panel has at least this many rows.
PANELS, SMALLEST_PANEL = 8, 64


def panels(features: int) -> list[slice]:
    """Cut the rows of a Gram matrix, (features, features), into panels.

    The matrix is symmetric: each panel is summed only from its diagonal block to the right. Eight panels take 9/16 of
    the products; `mirror` copies the rest.
    """
    size = max(SMALLEST_PANEL, -(-features // PANELS))
    return [slice(first, min(first + size, features)) for first in range(0, features, size)]


def add_products(total: Tensor, values: Tensor) -> None:
    """Add Σ x xᵀ over the rows x of `values`, (tokens, in), to the panels of `total`, (in, in); float32."""
    for rows in panels(len(total)):
        total[rows, rows.start :].addmm_(values[:, rows].t(), values[:, rows.start :])


def gram_flops(tokens: float, features: int) -> float:
    """Count the floating-point operations of `add_products`."""
    products: int = sum((rows.stop - rows.start) * (features - rows.start) for rows in panels(features))
    return 2 * tokens * products


def mirror(total: Tensor) -> Tensor:
    """Complete a sum of `add_products`, (in, in), in place: copy the panels below the diagonal."""
    for rows in panels(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].t()
    return total


class GramMatrix(RunningSums):
    """H = 2/n · Σ x xᵀ over all tokens of n sequences (SparseGPT, arXiv 2301.00774).

    `update` takes inputs of shape (sequences, tokens, in); `mean` is float32 of shape (in, in).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, features, device=device)
        self.sequences = _new_count()

    def update(self, inputs: Tensor) -> None:
        """Add a batch of sequences; products are float32, since rounded products are not positive definite."""
        with exact_half_products(inputs.dtype):
            for sequence in inputs:
                add_products(self.total, sequence.float())
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """H, float32 (in, in)."""
        return mirror(self.total * (2 / self.sequences.item()))


class TargetMoments(RunningSums):
    """Moments of inputs that give a linear's squared error on sparse inputs from a target.

    `gram` is Σ x xᵀ / n and `difference` is Σ (x − x′) xᵀ / n over all n tokens, both float32 (in, in); x is an input
    in the sparse model, x′ the same input in the dense model. A target between the outputs on x (mix 0) and on x′
    (mix 1) has the linear term L = mix · W · difference of `swaps.py`.

    `squared` and `crossed` are the sums, Σ x xᵀ (its panels) and Σ x′ xᵀ; `crossed` is None where x′ is x.
    """

    def __init__(self, features: int, device: torch.device, crossed: bool = True) -> None:
        self.squared = torch.zeros(features, features, device=device)
        self.crossed = torch.zeros_like(self.squared) if crossed else None
        self.tokens = _new_count()

    def update(self, inputs: Tensor, dense_inputs: Tensor | None) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in), x.
            dense_inputs: (sequences, tokens, in), x′; None where `crossed` is False: they equal `inputs`.
        """
        with exact_half_products(inputs.dtype):
            for index, sequence in enumerate(inputs):
                values = sequence.float()
                add_products(self.squared, values)
                if dense_inputs is not None and self.crossed is not None:
                    self.crossed.addmm_(dense_inputs[index].float().t(), values)
        self.tokens += inputs.shape[0] * inputs.shape[1]

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ / n, float32 (in, in)."""
        return mirror(self.squared / self.tokens.item())

    @property
    def difference(self) -> Tensor:
        """Σ (x − x′) xᵀ / n, float32 (in, in)."""
        if self.crossed is None:
            return torch.zeros_like(self.squared)
        return mirror(self.squared.clone()).sub_(self.crossed).div_(self.tokens.item())


SEQUENCES_TOGETHER, GRADIENT_BYTES = 4, 2**30  # a GPU holds gradients of so many sequences, or so many bytes, at a time


class GradientSquares(RunningSums):
    """Mean over sequences of the squared gradient of a weight (arXiv 2408.10631).

    The gradient of one sequence is `output_gradientᵀ · inputs`; it is squared before sequences are added.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self.sequences = _new_count()

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float = 1.0) -> None:
        """Add a batch.

        Args:
            inputs: (sequences, tokens, in).
            output_gradient: (sequences, tokens, out), each sequence divided by its `scale` and by `factor`.
            scale: (sequences,), float32, powers of two.
            factor: the same for all sequences.
        """
        if inputs.device.type == "cpu":
            for sequence, gradient, scaling in zip(inputs, output_gradient, scale, strict=True):
                _add_squares_by_rows(self.total, sequence, gradient, scaling, factor)
        else:
            itemsize = 4 if inputs.dtype == torch.float16 else inputs.element_size()
            size = gradients_together(self.total.numel(), itemsize)
            for part in (slice(first, first + size) for first in range(0, len(inputs), size)):
                _add_squares_at_once(self.total, inputs[part], output_gradient[part], scale[part], factor)
        self.sequences += len(inputs)

    @property
    def mean(self) -> Tensor:
        """Mean squared gradient, float32 (out, in)."""
        return self.total / self.sequences.item()


def _add_squares_by_rows(total: Tensor, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float) -> None:
    """Add a sequence's squared gradient to `total`, (out, in), as a CPU is fastest: a few rows at a time."""
    add_squares(total, weight_gradients(output_gradient, inputs), scale * factor)


def _add_squares_at_once(total: Tensor, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float) -> None:
    """Add squared gradients of some sequences to `total`, (out, in), as a GPU is fastest: in one pass over all."""
    add_squares_in_turn(total, weight_gradients(output_gradient, inputs), scale * factor)


def gradients_together(weights: int, itemsize: int) -> int:
    """Number of sequences whose gradients by so many weights, of this itemsize, a GPU holds and adds up at a time."""
    return max(1, min(SEQUENCES_TOGETHER, GRADIENT_BYTES // (weights * itemsize)))


def weight_gradients(output_gradients: Tensor, inputs: Tensor) -> Tensor:
    """Gradients by weights, (…, out, in), from gradients by outputs, (…, tokens, out), and inputs, (…, tokens, in).

    They have the gradients' dtype, or float32 for float16, since a sum over tokens can exceed the largest float16,
    65504.
    """
    if output_gradients.dtype == torch.float16:
        with exact_half_products(torch.float16):
            return weight_gradients(output_gradients.float(), inputs.float())
    return output_gradients.transpose(-2, -1) @ inputs


class FisherSums(RunningSums):
    """Fisher information of a linear's weights, summed over its columns and over its rows.

    The information of a weight is Σ (g x)² over tokens, with g the gradient of the loss by its output and x its input.
    `rows`, float64 (out,), is the sum over inputs, Σ g² ‖x‖²; `columns`, float64 (in,), the sum over outputs,
    Σ ‖g‖² x².
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
        for sequence, gradient, factor in zip(inputs, output_gradient, scale, strict=True):
            x, g = sequence.float().square(), (gradient.float() * factor).square()
            self.rows += x.sum(1) @ g
            self.columns += g.sum(1) @ x
