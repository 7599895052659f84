"""The border of each group, the score of its k-th lowest member, selected by C (`borders.c`) without sorting.

Sizes are checked here, not in C.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llm_barber import native
from llm_barber.native import Instructions
from llm_barber.native.threads import openmp_address, threads_for

SPARE = 16  # floats behind the members of a group to which C may write


class _Borders(ctypes.Structure):
    """`borders_t` of `borders.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "counts", "border", "scratch", "surplus", "openmp")),
        *((name, ctypes.c_size_t) for name in ("groups", "members")),
        *((name, ctypes.c_int) for name in ("parts", "level")),
    )


@cache
def _function() -> Callable[[int], None] | None:
    """C's function; None if the extension does not have it."""
    return native.find_function("find_borders", ctypes.c_void_p)


def can_select() -> bool:
    """Test whether `find_borders` can be called."""
    return _function() is not None


def find_borders(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Select the border of each group, on PyTorch's threads.

    Args:
        scores: (groups, members), float32, on the CPU, without NaN.
        counts: number k of members up to the border, from 0 to all of them, int64 (groups,), on the CPU.

    Returns:
        The borders, float32 (groups, 1), −∞ where k is 0; and bool (groups,), True where more than k members have no
        higher score.

    Raises:
        ValueError: arguments do not fit together.
    """
    function = _function()
    (groups, members), dtypes = scores.shape, (scores.dtype, counts.dtype)
    if function is None or dtypes != (torch.float32, torch.int64) or not scores.is_cpu or not counts.is_cpu:
        raise ValueError("borders are selected on a CPU, of float32 scores, by int64 counts")
    if counts.shape != (groups,) or (groups and not 0 <= counts.min() <= counts.max() <= members):
        raise ValueError(f"counts of {tuple(counts.shape)} do not fit {groups} groups of {members} members")
    scores, counts = scores.detach().contiguous(), counts.contiguous()
    parts = threads_for(groups, scores.numel())
    border, surplus = torch.empty(groups, 1), torch.empty(groups, dtype=torch.bool)
    scratch = torch.empty(parts, members + SPARE)
    task = _Borders(
        *(tensor.data_ptr() for tensor in (scores, counts, border, scratch, surplus)),
        openmp_address(),
        groups,
        members,
        parts,
        native.usable_instructions() > Instructions.AVX2,
    )
    function(ctypes.addressof(task))
    return border, surplus
