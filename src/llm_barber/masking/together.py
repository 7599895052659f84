"""Running sums of many linears at once: those of experts, which are computed together.

On a GPU the host takes longer to start an operation on one small expert than the GPU takes to compute it. Each function
adds a batch of n linears in a few operations, in the order of the sequences, as the statistics' own `update` does for
one linear. Results differ from `update`'s by the rounding of sums over tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_barber.masking.gradient_squares import FisherSums, GradientSquares, weight_gradients
from llm_barber.masking.gram import GramMatrix, TargetMoments
from llm_barber.masking.products import exact_half_products
from llm_barber.masking.statistics import InputMoments, InputSquares

# Most elements of matrices that are computed together; so many keep a GPU busy for longer than starting takes.
MATRIX_ELEMENTS = 2**24


def update_together(statistics: Sequence[Any], inputs: Tensor, *further: Tensor | float | None) -> None:
    """Update a statistic of each of n linears.

    Args:
        statistics: n statistics of one kind.
        inputs: (n, sequences, tokens, in).
        further: further arguments of `update`: tensors (n, sequences, …), except scales, (sequences,), and numbers.
    """
    together = TOGETHER.get(type(statistics[0]))
    if together is not None and len(statistics) > 1:
        together(statistics, inputs, *further)
        return
    for index, statistic in enumerate(statistics):
        statistic.update(inputs[index], *(_of_linear(part, index) for part in further))


def _of_linear(part: Tensor | float | None, index: int) -> Tensor | float | None:
    """A linear's part of a further argument."""
    return part[index] if isinstance(part, Tensor) and part.dim() > 1 else part


def _input_squares(statistics: Sequence[InputSquares], inputs: Tensor) -> None:
    for sequence in inputs.unbind(1):
        squares = torch.linalg.vector_norm(sequence, dim=1, dtype=torch.float32).square_()  # one pass over the inputs
        _add([statistic.total for statistic in statistics], squares)
    for statistic in statistics:
        statistic.sequences += inputs.shape[1]


def _input_moments(statistics: Sequence[InputMoments], inputs: Tensor) -> None:
    _input_squares([statistic.squares for statistic in statistics], inputs)
    counts = (inputs != 0).any(-1).sum(2)  # without the zeros that pad the inputs of experts
    for sequence, tokens in zip(inputs.unbind(1), counts.unbind(1), strict=True):
        totals = sequence.float().sum(1)
        _add([statistic.total for statistic in statistics], totals)
        explained = totals.double().square() / tokens.clamp_min(1).unsqueeze(1)
        _add([statistic.explained for statistic in statistics], explained)
    for statistic, tokens in zip(statistics, counts.sum(1).tolist(), strict=True):
        statistic.tokens += tokens


def _gram_matrices(statistics: Sequence[GramMatrix], inputs: Tensor) -> None:
    with exact_half_products(inputs.dtype):
        for sequence in inputs.unbind(1):
            for part in _parts(len(statistics), inputs.shape[-1] ** 2):
                values = sequence[part].float()
                _add([statistic.total for statistic in statistics[part]], torch.bmm(values.transpose(1, 2), values))
    for statistic in statistics:
        statistic.sequences += inputs.shape[1]


def _target_moments(statistics: Sequence[TargetMoments], inputs: Tensor, dense_inputs: Tensor | None) -> None:
    with exact_half_products(inputs.dtype):
        for index, sequence in enumerate(inputs.unbind(1)):
            for part in _parts(len(statistics), inputs.shape[-1] ** 2):
                values = sequence[part].float()
                _add([statistic.squared for statistic in statistics[part]], torch.bmm(values.transpose(1, 2), values))
                crossed = [statistic.crossed for statistic in statistics[part] if statistic.crossed is not None]
                if crossed and dense_inputs is not None:
                    dense_values = dense_inputs[part, index].float()
                    _add(crossed, torch.bmm(dense_values.transpose(1, 2), values))
    for statistic in statistics:
        statistic.tokens += inputs.shape[1] * inputs.shape[2]


def _gradient_squares(
    statistics: Sequence[GradientSquares], inputs: Tensor, output_gradients: Tensor, scale: Tensor, factor: float = 1.0
) -> None:
    for sequence, gradients, scaling in zip(inputs.unbind(1), output_gradients.unbind(1), scale, strict=True):
        for part in _parts(len(statistics), inputs.shape[-1] * gradients.shape[-1]):
            totals = [statistic.total for statistic in statistics[part]]
            add = _square_and_add if inputs.device.type == "cpu" else _add_squares
            add(totals, sequence[part], gradients[part], scaling, factor)
    for statistic in statistics:
        statistic.sequences += inputs.shape[1]


def _square_and_add(
    totals: list[Tensor], inputs: Tensor, output_gradients: Tensor, scale: Tensor, factor: float
) -> None:
    """Add a sequence's squared gradients of n linears to their totals, as a CPU does: scaled, squared, added."""
    _add(totals, weight_gradients(output_gradients, inputs).float().mul_(scale * factor).square_())


def _add_squares(totals: list[Tensor], inputs: Tensor, output_gradients: Tensor, scale: Tensor, factor: float) -> None:
    """Add a sequence's squared gradients of n linears to their totals, as a GPU does: squared as they are added."""
    # Scaled as they are converted to float32: PyTorch would add to totals of another dtype one by one.
    products = (weight_gradients(output_gradients, inputs) * (scale * factor).view(1, 1, 1)).unbind(0)
    torch._foreach_addcmul_(totals, products, products)


def _fisher_sums(statistics: Sequence[FisherSums], inputs: Tensor, output_gradients: Tensor, scale: Tensor) -> None:
    for sequence, gradients, factor in zip(inputs.unbind(1), output_gradients.unbind(1), scale, strict=True):
        x, g = sequence.float().square(), (gradients.float() * factor).square()
        _add([statistic.rows for statistic in statistics], torch.bmm(x.sum(2).unsqueeze(1), g).squeeze(1))
        _add([statistic.columns for statistic in statistics], torch.bmm(g.sum(2).unsqueeze(1), x).squeeze(1))


TOGETHER: dict[type, Callable[..., None]] = {
    InputSquares: _input_squares,
    InputMoments: _input_moments,
    GramMatrix: _gram_matrices,
    GradientSquares: _gradient_squares,
    TargetMoments: _target_moments,
    FisherSums: _fisher_sums,
}


def _add(totals: list[Tensor], values: Tensor) -> None:
    """Add each of n values, (n, …), to a total."""
    torch._foreach_add_(totals, list(values.to(totals[0].dtype).unbind(0)))


def _parts(count: int, elements: int) -> Iterator[slice]:
    """Cut matrices of so many elements into parts that are computed together."""
    size = max(1, MATRIX_ELEMENTS // elements)
    for first in range(0, count, size):
        yield slice(first, first + size)
