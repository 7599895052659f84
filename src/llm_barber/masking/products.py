"""Formats in which float32 matrices are multiplied, in PyTorch's settings of its backends."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact_half_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices in a faster format that represents values of `dtype` exactly.

    The values of the matrices came as `dtype`. CPUs multiply as bfloat16, GPUs as TF32, which also represents float16.
    Both add up in float32, so that only the sums are rounded. On processors with such products they take an eighth to
    a half of the time.
    """
    formats = {torch.bfloat16: {"mkldnn": "bf16", "cuda": "tf32"}, torch.float16: {"cuda": "tf32"}}.get(dtype, {})
    with float32_products(formats):
        yield


@contextmanager
def float32_products(formats: Mapping[str, str]) -> Iterator[None]:
    """Multiply float32 matrices in these formats, by PyTorch's backend: "ieee" (exact), "tf32" or "bf16"."""
    with ExitStack() as stack:
        for backend, precision in formats.items():
            settings: Any = getattr(torch.backends, backend).matmul
            stack.callback(setattr, settings, "fp32_precision", settings.fp32_precision)
            settings.fp32_precision = precision
        yield
