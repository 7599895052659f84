"""What products of packed linears may do, and products with many rows of inputs."""

import threading

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llm_barber.errors import SettingsError
from llm_barber.native.weight import BLOCK_ROWS, Weight

UNPACKED_BYTES = 1 << 22  # of rows that are unpacked and multiplied at once; fewer rows than `SHARED_ROWS` never are
SHARED_ROWS = 128  # rows are unpacked in multiples of this, which PyTorch's threads share evenly; of `BLOCK_ROWS`, too


def is_differentiated(inputs: Tensor, bias: Tensor | None) -> bool:
    """Test whether PyTorch differentiates the product, so that it must compute the product itself.

    It does in reverse mode, in forward mode (`torch.autograd.forward_ad`) and within a transform of `torch.func`.
    """
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and (inputs.requires_grad or (bias is not None and bias.requires_grad))


def is_plain(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Test whether products outside of PyTorch may take the place of its own, for weights of this dtype.

    Autocast changes dtypes inside of PyTorch's linear.

    Args:
        dtype: of the weight.
        device: type of the device of the product.

    Raises:
        SettingsError: `torch.jit.trace` is at work, which would miss these products.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise SettingsError(
            "torch.jit.trace does not see the products of packed linears",
            "make the model dense first: model.dequantize(), or load it without keep_packed",
        )
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == dtype


class _Buffers(threading.local):
    """Memory for unpacked weights by their dtype: each thread has its own."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def shared_buffer(dtype: torch.dtype, weights: int) -> Tensor:
    """Memory for unpacked weights, (weights,), until this thread asks for it again."""
    buffer = _buffers.by_dtype.get(dtype)
    if buffer is None or len(buffer) < weights:
        buffer = _buffers.by_dtype[dtype] = torch.empty(weights, dtype=dtype, device="cpu")
    return buffer[:weights]


def multiply_unpacked(weight: Weight, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Compute inputs · Wᵀ + bias, (…, rows): some rows of W are unpacked and multiplied, then the next ones.

    Args:
        weight: W.
        inputs: (…, columns), on the CPU, of the weight's dtype.
        bias: (rows,), of the weight's dtype; or None.
    """
    rows, columns = weight.rows, weight.columns
    least = -(-torch.get_num_threads() * BLOCK_ROWS // SHARED_ROWS)  # so that every thread has rows to unpack
    step = max(least, UNPACKED_BYTES // (columns * weight.dtype.itemsize * SHARED_ROWS)) * SHARED_ROWS
    buffer = shared_buffer(weight.dtype, min(step, rows) * columns)
    if step >= rows:
        whole = buffer.view(rows, columns)
        weight.unpack(0, rows, whole)
        return nn.functional.linear(inputs, whole, bias)
    outputs = inputs.new_empty((*inputs.shape[:-1], rows))
    flat, flat_outputs = inputs.reshape(-1, columns), outputs.view(-1, rows)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        part = buffer[: (end - first) * columns].view(-1, columns)
        weight.unpack(first, end, part)
        if bias is None:
            torch.mm(flat, part.T, out=flat_outputs[:, first:end])
        else:
            torch.addmm(bias[first:end], flat, part.T, out=flat_outputs[:, first:end])
    return outputs
