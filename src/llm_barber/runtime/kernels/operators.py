"""The kernels as operators of PyTorch, `torch.ops.llm_barber.…`: torch.compile keeps them in one graph.

PyTorch learns here the shape and dtype of their results, which it needs where there are no data. Triton is imported by
the first call. Nothing depends on values of a tensor, and nothing waits for the GPU, so that CUDA graphs capture them.
"""

import torch
from torch import Tensor


@torch.library.custom_op("llm_barber::packed_product", mutates_args=())
def packed_product(
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    row_starts: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    group: int,
) -> Tensor:
    """Compute inputs · Wᵀ + bias without unpacking: `product.decode_product`."""
    from llm_barber.runtime.kernels.product import decode_product

    return decode_product(values, words, starts, row_starts, inputs, bias, scales, group)


@packed_product.register_fake
def _(
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    row_starts: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    group: int,
) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], words.shape[0]))


@torch.library.custom_op("llm_barber::unpacked", mutates_args=())
def unpacked(
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    row_starts: Tensor,
    scales: Tensor | None,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Unpack a weight, (out, in): `unpack.unpack`."""
    from llm_barber.runtime.kernels.unpack import unpack

    return unpack(values, words, starts, row_starts, scales, group, columns, dtype)


@unpacked.register_fake
def _(
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    row_starts: Tensor,
    scales: Tensor | None,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty((words.shape[0], columns), dtype=dtype)
