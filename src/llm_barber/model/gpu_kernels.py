"""PyTorch's choice of CUDA kernels, the same for a whole run.

A difference of two outputs measures pruning only if both come from the same kernels.

- Attention: on GPUs of compute capability 9.0 and 10.0 PyTorch prefers cuDNN's kernel, but not in deterministic mode,
  which gradients take (`fixed_order.py`). Without cuDNN's, both are computed by the flash kernel, or by the
  memory-efficient one in float32, below capability 8.0, and where attention has a mask. (On capability 8.6, 8.9 and
  12.x heads of 193 to 224 features still differ: the flash kernel has no backward pass for them.)
- Products in half precision: by default cuBLAS may add partial sums in half precision, depending on the shape.
- Products in float32: a program, or an environment variable of its container, may have allowed TF32, which rounds
  inputs to 10 bits. Only Gram matrices and float16 gradients of weights take it, where it is exact
  (`masking/products.py`).
- Deterministic mode: a program may have switched it on. It would refuse `torch.median` and `torch.kthvalue`, whose
  values are deterministic, and whose indices nobody reads. Gradients switch it on themselves (`fixed_order.py`).

Only these settings of PyTorch change, and only within the context; on CPUs the first three have no effect.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from llm_barber.masking.products import float32_products

# Of what a GPU computes: higher whenever the same run may give other bits there; 2: norms; 3: rotary and SwiGLU;
# 4: GELU of gates.
REVISION = 4
REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextmanager
def same_kernels() -> Iterator[None]:
    """Fix PyTorch's choice of CUDA kernels within the context: the four settings of the module's docstring."""
    cuda: Any = torch.backends.cuda
    with ExitStack() as stack:
        stack.callback(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())
        cuda.enable_cudnn_sdp(False)
        for name in REDUCTIONS:
            stack.callback(setattr, cuda.matmul, name, _reduction(cuda.matmul, name))
            setattr(cuda.matmul, name, False)
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        stack.enter_context(float32_products({"cuda": "ieee"}))
        yield


def _reduction(matmul: Any, name: str) -> bool | tuple[bool, bool]:
    """Value of a setting, as it is set: newer versions of PyTorch have a second flag, for split sums."""
    value, split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    return value if split is None else (value, split)
