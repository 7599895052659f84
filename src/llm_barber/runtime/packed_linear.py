"""A linear whose weight stays packed in memory: kept values and a bit a weight, for every encoding."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_barber import native
from llm_barber.checkpoint.bits import POPCOUNT, as_integers, put_kept
from llm_barber.checkpoint.encoding import Packed, bitmask
from llm_barber.native import avx512

DECODE_ROWS = 8  # most rows of inputs that the decode kernel takes
VALUES_A_THREAD = 1 << 16  # fewest values that are worth a thread of their own
BLOCK_COLUMNS = 256  # columns of a block of the decode kernel: its int32 start adds 0.8 % to bfloat16 weights


class PackedLinear(nn.Module):
    """A drop-in for `nn.Linear` without gradients of its weight.

    On the CPU, up to four rows of inputs (eight with AVX-512) are multiplied with the packed weight where
    `llm_barber.native` was built.
    Otherwise each use unpacks the weight into a buffer that all linears of this size share. On CUDA with Triton, up to
    `DECODE_ROWS` rows of inputs go through the decode kernel, which does not unpack; more rows are multiplied with the
    weight unpacked on the GPU. The kernel and the unpacking on the GPU are untested on a real GPU.

    Args:
        packed: the weight, (out, in).
        bias: (out,), or None; it may still be empty.
    """

    values: Tensor
    bits: Tensor
    starts: Tensor | None
    _buffers_by_size: dict[tuple[int, torch.dtype], Tensor] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, packed: Packed, bias: Any) -> None:
        super().__init__()
        self.shape = packed.shape
        self.register_buffer("values", packed.values)
        self.register_buffer("bits", torch.from_numpy(bitmask(packed)))
        self.register_buffer("starts", None)
        self.bias = bias
        self._parts: dict[int, list[tuple[int, int, int, int]]] = {}

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, (out, in); on the CPU valid until another linear of the same size is used."""
        if self.values.device.type != "cpu":
            return unpack_on_device(self.values, self.bits, self.shape)
        rows, columns = self.shape
        key = (rows * columns, self.values.dtype)
        if key not in self._buffers_by_size:
            self._buffers_by_size[key] = torch.empty(rows * columns, dtype=self.values.dtype)
        put_kept(as_integers(self.values), self.bits.numpy(), as_integers(self._buffers_by_size[key]))
        return self._buffers_by_size[key].view(rows, columns)

    def dense(self) -> nn.Linear:
        """An ordinary linear with the unpacked weight."""
        rows, columns = self.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias, (…, out)."""
        differentiated = torch.is_grad_enabled() and inputs.requires_grad
        rows = inputs.numel() // self.shape[1]
        if use_kernel(self.values.device.type, rows, differentiated):
            return self.decode(inputs)
        if use_native(self.values, inputs.dtype, self.shape[1], rows, differentiated):
            return self.decode_on_cpu(inputs)
        return nn.functional.linear(inputs, self.weight, self.bias)

    def decode(self, inputs: Tensor) -> Tensor:
        """Compute `forward` by the decode kernel; at most `DECODE_ROWS` rows."""
        from llm_barber.runtime.kernels.decode import decode_product

        if self.starts is None:
            self.starts = block_starts(self.bits, self.shape, BLOCK_COLUMNS)
        return decode_product(self.values, self.bits, self.starts, inputs, self.bias, BLOCK_COLUMNS)

    def decode_on_cpu(self, inputs: Tensor) -> Tensor:
        """Compute `forward` without unpacking, summed in float32; as many rows as `use_native` takes."""
        rows, columns = self.shape
        parts = self._thread_parts(self._threads())
        if avx512.can_multiply(columns, self.values.dtype, inputs.dtype):
            flat = inputs.reshape(-1, columns).contiguous()
            row_ends, value_ends = [0, *(part[1] for part in parts)], [0, *(part[3] for part in parts)]
            outputs = avx512.multiply(self.values, self.bits, flat, self.bias, row_ends, value_ends)
            return outputs.view(*inputs.shape[:-1], rows)
        flat = inputs.reshape(-1, columns).float().contiguous()
        outputs = torch.empty(len(flat), rows)

        def multiply(part: tuple[int, int, int, int]) -> None:
            first_row, end_row, first_value, end_value = part
            bits = self.bits[first_row * columns // 8 : end_row * columns // 8]
            native.product(self.values[first_value:end_value], bits, flat, outputs[:, first_row:end_row])

        if len(parts) == 1:
            multiply(parts[0])
        else:
            list(_pool(len(parts)).map(multiply, parts))
        if self.bias is not None:
            outputs += self.bias.float()
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], rows)

    def _threads(self) -> int:
        """Number of threads of a product: few values are multiplied sooner than a second thread would begin."""
        return max(1, min(torch.get_num_threads(), self.shape[0], self.values.shape[0] // VALUES_A_THREAD))

    def _thread_parts(self, threads: int) -> list[tuple[int, int, int, int]]:
        """Each thread's first row and end row, first value and end value; ends are exclusive.

        Threads have about as many values each. Rows are whole bytes of the bit mask.
        """
        if threads not in self._parts:
            rows, columns = self.shape
            of_rows = np.bitwise_count(self.bits.numpy().reshape(rows, columns // 8)).sum(1, dtype=np.int64)
            before = np.concatenate([[0], of_rows.cumsum()])  # values before each row
            shares = [int(before[-1]) * number // threads for number in range(1, threads)]
            ends = [0, *np.searchsorted(before, shares).tolist(), rows]
            starts = before[ends].tolist()
            self._parts[threads] = list(zip(ends, ends[1:], starts, starts[1:], strict=False))
        return self._parts[threads]

    def extra_repr(self) -> str:
        """Shape, and the share of weights that is kept."""
        rows, columns = self.shape
        return f"in_features={columns}, out_features={rows}, kept={len(self.values) / (rows * columns):.0%}"


def use_kernel(device: str, rows: int, differentiated: bool) -> bool:
    """True if the decode kernel takes `rows` rows of inputs; it has no gradient."""
    return device == "cuda" and 1 <= rows <= DECODE_ROWS and not differentiated and find_spec("triton") is not None


def use_native(values: Tensor, inputs: torch.dtype, columns: int, rows: int, differentiated: bool) -> bool:
    """True if `rows` rows of inputs of this dtype are multiplied with the packed weight on the CPU."""
    if values.device.type != "cpu" or differentiated or rows < 1:
        return False
    if avx512.can_multiply(columns, values.dtype, inputs):
        return rows <= avx512.FAST_ROWS
    return rows <= native.PRODUCT_ROWS and native.can_multiply(columns, values.dtype)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def unpack_on_device(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Unpack a weight, (out, in), by PyTorch's operations, on the device of its parts.

    Args:
        values: (kept,).
        bits: uint8, (⌈out · in / 8⌉,).
        shape: out, in.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits[:, None] >> shifts) & 1).view(-1)[: shape[0] * shape[1]].bool()
    return values.new_zeros(shape[0] * shape[1]).masked_scatter_(kept, values).view(shape)


def block_starts(bits: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """Number of bits set before each block of columns of each row: (out, ⌈in / block⌉).

    int32; int64 from 2³¹ weights on.

    Example: bits of the rows 1010 and 0110, block=2 -> [[0, 1], [2, 3]].

    Args:
        bits: uint8, (⌈out · in / 8⌉,), row after row.
        shape: out, in.
        block: columns of a block.
    """
    rows, columns = shape
    dtype = torch.int32 if rows * columns < 2**31 else torch.int64
    counts = torch.from_numpy(POPCOUNT).to(bits.device)
    before = counts[bits.int()].cumsum(0, dtype=dtype) - counts[bits.int()]  # each byte: set bits before it
    first_columns = torch.arange(0, columns, block, device=bits.device)
    bit = torch.arange(rows, device=bits.device)[:, None] * columns + first_columns
    byte = bit >> 3
    lower = bits[byte].int() & ((1 << (bit & 7)) - 1)  # bits of the byte that are before the block
    return (before[byte] + counts[lower]).to(dtype)
