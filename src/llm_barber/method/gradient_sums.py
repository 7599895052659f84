"""Sums of gradients by the weights of a layer over the sequences of a step of tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_barber.masking.by_rows import add_scaled
from llm_barber.settings.refining import SEQUENCES_A_STEP

# Gradients are summed in more bits, so that their order, and the number of processes, hardly ever show in the sum.
SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
GATHERED = 2**31  # most bytes of gradients that a GPU gathers


def gradients_gathered(weights: int, itemsize: int, on_cpu: bool) -> int:
    """Number of sequences whose gradients are added to the sums together.

    A GPU then reads and writes the sums less often. A CPU's memory holds the gradients of one sequence.

    Args:
        weights: number of weights that are tuned.
        itemsize: bytes of a gradient's number.
        on_cpu: whether a CPU computes.
    """
    return 1 if on_cpu else min(SEQUENCES_A_STEP, max(1, GATHERED // max(1, weights * itemsize)))


class GradientSums:
    """Sums of gradients, in the dtype of `SUM_DTYPES`, in the order of the sequences.

    Args:
        weights: what gradients are taken by, of any shape, by name.
        dtype: of the gradients.
    """

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._sums = {name: torch.empty_like(weight, dtype=SUM_DTYPES[dtype]) for name, weight in weights.items()}
        on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
        self._together = gradients_gathered(sum(map(Tensor.numel, weights.values())), dtype.itemsize, on_cpu)
        self._gathered: list[tuple[Mapping[str, Tensor], Tensor]] = []
        self._empty = set(self._sums)

    def begin(self) -> None:
        """Begin the sums of another step."""
        self._empty = set(self._sums)

    def add(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Add a sequence's gradients times a scale, float32 (1,); weights that are not named get none."""
        self._gathered.append((gradients, scale))
        if len(self._gathered) == self._together:
            self._add_gathered()

    def finish(self) -> dict[str, Tensor]:
        """Return the sums, by name; the next step overwrites them."""
        self._add_gathered()
        for name in self._empty:
            self._sums[name].zero_()
        return self._sums

    def _add_gathered(self) -> None:
        for name, total in self._sums.items():
            added = [(gradients[name], scale) for gradients, scale in self._gathered if name in gradients]
            if added:
                values, scales = zip(*added, strict=True)
                add_scaled(total, values, scales, begins=name in self._empty)
                self._empty.discard(name)
        self._gathered.clear()
