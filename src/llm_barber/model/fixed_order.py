"""Gradients that a GPU adds up in a fixed order, so that a run gives the same bytes again.

CUDA's usual backward pass of attention, and a few other operations, add up in whatever order their threads come.
PyTorch has others in their place, for most; where it has none the run goes on without, and says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NONE_THERE = "does not have a deterministic implementation"  # as PyTorch says it


@contextmanager
def in_fixed_order(wanted: bool = True) -> Iterator[None]:
    """Within, operations of CUDA add up in a fixed order, if that is wanted.

    Raises:
        RuntimeError: one of them cannot (`cannot_order`).
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module's property
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def cannot_order(error: RuntimeError) -> bool:
    """Is it that an operation has no fixed order?"""
    return NONE_THERE in str(error)
