"""Gradients that a GPU adds up in a fixed order, so that a run gives the same bytes again.

CUDA's usual backward pass of attention, and a few other operations, add up in whatever order their threads come.
PyTorch has others in their place, for most; where it has none the run goes on without, and says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

# As PyTorch says it: of operations, and of cuBLAS, if the program used it before it was told how (`model/device.py`).
NONE_THERE = ("does not have a deterministic implementation", "not deterministic because it uses CuBLAS")
Found = TypeVar("Found")


class FixedOrder:
    """Whether sums are wanted in a fixed order, and whether that was found to be impossible (`unavailable`)."""

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.unavailable = False

    def compute(self, once: Callable[[], Found], undo: Callable[[], None]) -> Found:
        """What `once` gives, with operations of CUDA that add up in a fixed order, if that is wanted and they can.

        Args:
            once: computes; may be called again.
            undo: takes back what `once` has done when it was in vain.
        """
        if self.enabled and not self.unavailable:
            try:
                with in_fixed_order():
                    return once()
            except RuntimeError as error:
                if not any(words in str(error) for words in NONE_THERE):
                    raise
            self.unavailable = True
            undo()
        return once()


@contextmanager
def in_fixed_order() -> Iterator[None]:
    """Within, operations of CUDA add up in a fixed order, or raise a RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module's property
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
