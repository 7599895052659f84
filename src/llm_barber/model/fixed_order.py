"""Gradients that a GPU adds up in a fixed order, so that a run gives the same bytes again.

CUDA's usual backward pass of attention, and a few other operations, add up in the order in which threads arrive.
PyTorch has deterministic operations in place of most of them. Where it has none, the run goes on without a fixed
order, and says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

# Parts of PyTorch's errors: of an operation, and of cuBLAS, if it was used before its setting (`model/device.py`).
NOT_DETERMINISTIC = ("does not have a deterministic implementation", "not deterministic because it uses CuBLAS")
Result = TypeVar("Result")


class FixedOrder:
    """Compute with sums in a fixed order, if `enabled`; `unavailable` once an operation lacked one."""

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.unavailable = False

    def compute(self, function: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """Call a function, in a fixed order if that is enabled and available; return its result.

        Args:
            function: the computation; it is called again, without a fixed order, if an operation has none.
            undo: undoes the side effects of the failed call.
        """
        if self.enabled and not self.unavailable:
            try:
                with in_fixed_order():
                    return function()
            except RuntimeError as error:
                if not any(text in str(error) for text in NOT_DETERMINISTIC):
                    raise
            self.unavailable = True
            undo()
        return function()


@contextmanager
def in_fixed_order() -> Iterator[None]:
    """Let CUDA operations add up in a fixed order, or raise a RuntimeError, within the context."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module's property
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
