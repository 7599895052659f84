"""The kernels as operators of PyTorch, `torch.ops.llm_barber.…`: torch.compile keeps them in one graph.

PyTorch learns here the shape and dtype of their results, which it needs where there are no data. Triton is imported by
the first call. Nothing depends on values of a tensor, and nothing waits for the GPU, so that CUDA graphs capture them.
The operators have no gradient. The schemas below name the arguments of an operator and of its shape, in order.
"""

from typing import Any

import torch
from torch import Tensor

# `torch.library.custom_op` is shorter, and makes each call several times as long.
_library = torch.library.Library("llm_barber", "DEF")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor values, Tensor words, Tensor starts, Tensor row_starts"
_library.define(f"packed_product({_WEIGHT}, Tensor inputs, Tensor? bias, Tensor? scales, int group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(f"unpacked({_WEIGHT}, Tensor? scales, int group, int columns, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


def _packed_product(*arguments: Any) -> Tensor:
    """Compute inputs · Wᵀ + bias without unpacking: `product.decode_product`."""
    from llm_barber.runtime.kernels.product import decode_product

    return decode_product(*arguments)


def _packed_product_shape(*arguments: Any) -> Tensor:
    _, words, _, _, inputs, *_ = arguments
    shape: Tensor = inputs.new_empty((*inputs.shape[:-1], words.shape[0]))
    return shape


def _unpacked(*arguments: Any) -> Tensor:
    """Unpack a weight, (out, in): `unpack.unpack`."""
    from llm_barber.runtime.kernels.unpack import unpack

    return unpack(*arguments)


def _unpacked_shape(*arguments: Any) -> Tensor:
    values, words, *_, columns, dtype = arguments
    shape: Tensor = values.new_empty((words.shape[0], columns), dtype=dtype)
    return shape


_library.impl("packed_product", _packed_product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("unpacked", _unpacked, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("llm_barber::packed_product", _packed_product_shape, lib=_library)
torch.library.register_fake("llm_barber::unpacked", _unpacked_shape, lib=_library)
packed_product = torch.ops.llm_barber.packed_product.default
unpacked = torch.ops.llm_barber.unpacked.default
