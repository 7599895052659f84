"""Amounts of work by kind; each kind has a rate of its own (`rates.py`)."""

from dataclasses import dataclass, fields
from math import log2


@dataclass(frozen=True)
class Work:
    """Amounts that add up.

    FLOPs in the compute dtype: `products` of activations with weights, `gradients` of weights from activations,
    `attention`. FLOPs in float32: `grams` (of values that have the compute dtype) and `exact`. Bytes: `moved` through
    memory by everything but matrix products, `copied` between host and device, `reduced` over the processes, `read` and
    `written` on disk, `kept` there for `--resume`, with a faster hash than the output's. Elements times the binary
    logarithm of the number that is sorted together: `sorted` as values alone, `ordered` with their order
    (`torch.sort`). `searched`: weights that rounds of swaps look at. `launches`: kernels that a GPU starts.
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
    kept: float = 0
    launches: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)))

    def __radd__(self, _: int) -> "Work":
        """Add to the 0 that `sum` starts with."""
        return self

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * getattr(self, kind.name) for kind in fields(self)))

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products."""
        return self.products + self.gradients + self.attention + self.grams + self.exact


NO_WORK = Work()


def sorting_work(elements: float, group_size: float) -> float:
    """Work of sorting elements in groups of a size.

    Example: elements=1000, group_size=8 -> 3000.
    """
    return elements * log2(max(2, group_size))
