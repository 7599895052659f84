"""The comparison by which a module of a model may be replaced by one operation (`fused_*.py`)."""

import torch
from torch import Tensor


def has_bits_of(output: object, expected: Tensor) -> bool:
    """Test whether an output is a tensor with the dtype, the shape and the numbers of what is expected."""
    return isinstance(output, Tensor) and output.dtype == expected.dtype and torch.equal(output, expected)
