"""Sums of gradients by the weights of a layer over the sequences of a step of tuning."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_barber.gpu.kernels import has_kernels
from llm_barber.masking.by_rows import add_scaled
from llm_barber.settings.presets import SEQUENCES_A_STEP

# Gradients are summed in more bits, so that their order, and the number of processes, hardly ever show in the sum.
SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
GATHERED = 2**31  # most bytes of gradients that a GPU gathers
FLOAT32 = torch.float32.itemsize


def gradients_gathered(weights: int, itemsize: int) -> int:
    """Number of sequences whose gradients a GPU adds to the sums together, so that it reads and writes them less often.

    Float32 gradients are added one by one: most have sums in float64, which the GPU's kernel does not add up.

    Args:
        weights: number of weights that are tuned.
        itemsize: bytes of a gradient's number.
    """
    return 1 if itemsize == FLOAT32 else min(SEQUENCES_A_STEP, max(1, GATHERED // max(1, weights * itemsize)))


class GradientSums:
    """Sums of gradients, in the dtype of `SUM_DTYPES`, in the order of the sequences.

    Args:
        weights: what gradients are taken by, of any shape, by name.
        dtype: of the layer. Gradients have it too, or float32 for float16.
    """

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._sums = {name: _empty_sum(weight, SUM_DTYPES[dtype]) for name, weight in weights.items()}
        numbers, devices = sum(map(Tensor.numel, weights.values())), {weight.device for weight in weights.values()}
        added_together = all(has_kernels(device, dtype) for device in devices)
        itemsize = FLOAT32 if dtype == torch.float16 else dtype.itemsize
        self._together = gradients_gathered(numbers, itemsize) if added_together else 1
        self._gathered: list[tuple[Mapping[str, Tensor], Tensor]] = []
        self._empty = set(self._sums)

    def begin(self) -> None:
        """Begin the sums of another step."""
        self._gathered.clear()
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


def _empty_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a sum, contiguous whatever the weight's strides are: a GPU's kernel takes no other."""
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)
