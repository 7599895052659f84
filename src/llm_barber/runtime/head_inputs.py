"""Keep PyTorch from copying the weight of an output head whose inputs are cut out of longer states."""

from typing import Any

import torch
from torch import Tensor, nn


def avoid_weight_copies(head: nn.Module | None) -> None:
    """Give an output head, if it is a dense linear, inputs whose rows follow each other in memory.

    A model computes logits of a prompt's last token alone: it cuts (sequences, 1, in) out of (sequences, tokens, in).
    For a weight that takes no gradients PyTorch multiplies such inputs sequence by sequence (`should_fold` in
    aten/src/ATen/native/LinearAlgebra.cpp), and copies the whole transposed weight for that: seconds for a vocabulary
    of 262,144 tokens. The rows alone are a few kilobytes.
    """
    if type(head) is nn.Linear:
        head.register_forward_pre_hook(_with_contiguous_rows)


def _with_contiguous_rows(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return None  # a trace would keep one answer for inputs of all shapes
    states = inputs[0] if inputs else None
    if not isinstance(states, Tensor) or states.stride() == _strides(states.shape):
        return None
    return states.clone(memory_format=torch.contiguous_format), *inputs[1:]


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous tensor, those of dimensions of size 1 among them."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
