"""Amounts of work, by what sets their pace: each kind has a rate of its own (`machine.py`)."""

from dataclasses import dataclass, fields
from math import log2


@dataclass(frozen=True)
class Work:
    """Amounts that add up.

    FLOPs: `products` of activations with weights, `gradients` of weights from activations, `attention`, these in the
    compute dtype; `grams` (float32, of values that have the compute dtype) and `exact` (float32). Bytes: `moved`
    through memory by everything that is no matrix product, `copied` between host and device, `reduced` over the
    processes, `read` and `written` on disk. `sorted` and `ordered` (by `torch.sort`): elements times the binary
    logarithm of how many are sorted together. `searched`: weights that rounds of swaps look at.
    """

    products: float = 0
    gradients: float = 0
    attention: float = 0
    grams: float = 0
    exact: float = 0
    moved: float = 0
    sorted: float = 0
    ordered: float = 0
    searched: float = 0
    copied: float = 0
    reduced: float = 0
    read: float = 0
    written: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __radd__(self, _: int) -> "Work":
        """For `sum`, which starts at 0."""
        return self

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * getattr(self, one.name) for one in fields(self)))

    @property
    def flops(self) -> float:
        """Of all matrix products."""
        return self.products + self.gradients + self.attention + self.grams + self.exact


NONE = Work()


def sorting(elements: float, together: float) -> float:
    """The work of sorting so many elements, so many at a time."""
    return elements * log2(max(2, together))
