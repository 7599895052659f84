"""Rotary embeddings of attention in one operation (`gpu/steps.py`).

Most families of transformers rotate queries and keys by a function of their module, `apply_rotary_pos_emb`. It is
known by what it computes: one that gives other bits on the CPU, in any of three dtypes, stays. The function is
replaced only while the attention of the program's own model runs.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber.gpu.kernels import DTYPES
from llm_barber.gpu.steps import rotate

NAME = "apply_rotary_pos_emb"
SEQUENCES, HEADS, KEY_HEADS, TOKENS, FEATURES = 2, 3, 1, 5, 12  # of what a function is tried on
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
        module.forward = partial(_forward, namespace, module.forward)


def _forward(namespace: dict[str, Any], unfused: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a forward in whose namespace the function is replaced."""
    original = namespace[NAME]
    namespace[NAME] = partial(_rotate_both, original)
    try:
        return unfused(*arguments, **named)
    finally:
        namespace[NAME] = original


def _rotate_both(
    original: Rotary, queries: Tensor, keys: Tensor, cosine: Tensor, sine: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; the original function does so if there are further arguments, or if dtypes differ.

    Queries and keys are (sequences, heads, tokens, features), angles (1 or sequences, tokens, features).
    """
    dtypes = {tensor.dtype for tensor in (queries, keys, cosine, sine)}
    plain = len(dtypes) == 1 and cosine.dim() == queries.dim() - 1 and queries.shape[-1] % 2 == 0
    if others or named or not plain or cosine.requires_grad:
        return original(queries, keys, cosine, sine, *others, **named)
    return rotate(queries, cosine, sine), rotate(keys, cosine, sine)


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
    return (
        isinstance(result, tuple)
        and len(result) == len(expected)
        and all(
            isinstance(part, Tensor) and part.dtype == dtype and torch.equal(part, right)
            for part, right in zip(result, expected, strict=True)
        )
    )
