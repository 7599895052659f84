"""Rotary embeddings of attention in one operation (`gpu/steps.py`).

Most families of transformers rotate queries and keys by a function of their module, `apply_rotary_pos_emb`. It is
known by what it computes: one that gives other bits for random numbers on the CPU, in any of three dtypes, stays. The
function is replaced only while the attention of the program's own model runs.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.gpu.kernels import DTYPES
from llm_barber.gpu.steps import rotate
from llm_barber.model.same_bits import has_bits_of

NAME = "apply_rotary_pos_emb"
SEQUENCES, HEADS, KEY_HEADS, TOKENS, FEATURES = 2, 3, 1, 5, 12  # of what a function is tried on
REPLACING = threading.RLock()  # one thread at a time replaces the function
Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(modules: nn.Module) -> None:
    """Let the attention modules among some modules rotate queries and keys in one operation each.

    Args:
        modules: their weights may be on `meta`. Hooks on them stay.
    """
    for module in modules.modules():
        forward = inspect.unwrap(type(module).forward)
        code, namespace = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if code is None or NAME not in code.co_names or not is_rotary(namespace.get(NAME)):
            continue
        module.forward = partial(_forward, forward.__module__, module.forward)


def _forward(source: str, unfused: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a forward while the function is replaced in the Python module that it is from."""
    with REPLACING:
        namespace = sys.modules[source].__dict__
        original = namespace[NAME]
        namespace[NAME] = partial(_rotate_both, original)
        try:
            return unfused(*arguments, **named)
        finally:
            namespace[NAME] = original


def _rotate_both(
    original: Rotary, queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, (sequences, heads, tokens, features), in one operation each.

    The original function does so if it is given more arguments, other dtypes, or angles that are not (1 or sequences,
    tokens, features): some models rotate a part of the features.
    """
    if others or named or not all(_is_plain(states, cosine, sine) for states in (queries, keys)):
        return original(queries, keys, cosine, sine, *others, **named)
    return rotate(queries, cosine, sine), rotate(keys, cosine, sine)


def _is_plain(states: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Test whether `rotate` takes these states and angles."""
    if states.dim() != 4 or states.shape[-1] % 2 or cosine.requires_grad or sine.requires_grad:
        return False
    sequences, _, tokens, features = states.shape
    angles = [(1, tokens, features), (sequences, tokens, features)]
    return cosine.shape == sine.shape and cosine.shape in angles and {states.dtype} == {cosine.dtype, sine.dtype}


@cache
def is_rotary(function: Rotary | None) -> bool:
    """Test whether a function gives the bits of `rotate`, on the CPU, for random queries, keys and angles."""
    return function is not None and all(_has_its_bits(function, dtype) for dtype in DTYPES)


def _has_its_bits(function: Rotary, dtype: torch.dtype) -> bool:
    with torch.device("cpu"):
        made = torch.Generator().manual_seed(0)
        queries, keys = (
            torch.randn(SEQUENCES, heads, TOKENS, FEATURES, generator=made).to(dtype) for heads in (HEADS, KEY_HEADS)
        )
        cosine, sine = torch.randn(2, SEQUENCES, TOKENS, FEATURES, generator=made).to(dtype)
        result: Any = None
        with suppress(Exception):  # a function of other arguments is not of this form
            result = function(queries, keys, cosine, sine)
        expected = rotate(queries, cosine, sine), rotate(keys, cosine, sine)
    return isinstance(result, tuple) and len(result) == len(expected) and all(map(has_bits_of, result, expected))
