"""Sums that a GPU adds up in a fixed order, so that a run gives the same bytes again.

CUDA's usual backward pass of attention, and a few other operations, add up in the order in which threads arrive.
PyTorch has deterministic operations in place of most of them, and warns of an operation without one. Forward and
backward passes of attention then take the same kernels, too: a difference of two outputs measures pruning only if both
come from the same kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Let a GPU add up in a fixed order within the context, where PyTorch can; a CPU always does."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module's property
    if device.type != "cpu":
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
