"""A linear whose weight stays packed in memory: kept values and one bit a weight, whatever the encoding on disk."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from llm_barber import native
from llm_barber.checkpoint.bits import POPCOUNT, as_integers, count_bits, put_kept
from llm_barber.checkpoint.encoding import Packed, bitmask

DECODE_ROWS = 8  # of inputs, up to which the decode kernel is used
BLOCK_COLUMNS = 256  # of the decode kernel: one int32 for so many weights, 0.8 % of bfloat16


class PackedLinear(nn.Module):
    """On the CPU up to four rows of inputs are multiplied with the packed weight, where `llm_barber.native` was built.

    Else the weight is unpacked into a buffer that all linears of its size share, whenever it is used. On CUDA with
    Triton, up to `DECODE_ROWS` rows of inputs go through the decode kernel, which does not unpack; more are multiplied
    with the weight unpacked on the GPU. The kernel and the GPU's unpacking are untested on a real GPU.

    Args:
        packed: its weight, (out, in).
        bias: (out,), or None; it may still be empty.
    """

    values: Tensor
    bits: Tensor
    starts: Tensor | None
    _memory: dict[tuple[int, torch.dtype], Tensor] = {}  # noqa: RUF012 - shared on purpose

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
        """Unpacked, (out, in); on the CPU valid until another linear of the same size is used."""
        if self.values.device.type != "cpu":
            return unpack_on_device(self.values, self.bits, self.shape)
        rows, columns = self.shape
        key = (rows * columns, self.values.dtype)
        if key not in self._memory:
            self._memory[key] = torch.empty(rows * columns, dtype=self.values.dtype)
        put_kept(as_integers(self.values), self.bits.numpy(), as_integers(self._memory[key]))
        return self._memory[key].view(rows, columns)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias, (…, out)."""
        differentiated = torch.is_grad_enabled() and inputs.requires_grad
        rows = inputs.numel() // self.shape[1]
        if use_kernel(self.values.device.type, rows, differentiated):
            return self.decode(inputs)
        if use_native(self.values, self.shape[1], rows, differentiated):
            return self.decode_on_cpu(inputs)
        return nn.functional.linear(inputs, self.weight, self.bias)

    def decode(self, inputs: Tensor) -> Tensor:
        """As `forward`, by the decode kernel; at most `DECODE_ROWS` rows."""
        from llm_barber.runtime.kernels.decode import decode_product

        if self.starts is None:
            self.starts = block_starts(self.bits, self.shape, BLOCK_COLUMNS)
        return decode_product(self.values, self.bits, self.starts, inputs, self.bias, BLOCK_COLUMNS)

    def decode_on_cpu(self, inputs: Tensor) -> Tensor:
        """As `forward`, without unpacking, summed in float32; at most `native.PRODUCT_ROWS` rows."""
        rows, columns = self.shape
        flat = inputs.reshape(-1, columns).float().contiguous()
        outputs = torch.empty(len(flat), rows)

        def one(part: tuple[int, int, int, int]) -> None:
            first, last, start, end = part
            bits = self.bits[first * columns // 8 : last * columns // 8]
            native.product(self.values[start:end], bits, flat, outputs[:, first:last])

        parts = self._rows_of_threads(min(torch.get_num_threads(), rows))
        if len(parts) == 1:
            one(parts[0])
        else:
            list(_pool(len(parts)).map(one, parts))
        if self.bias is not None:
            outputs += self.bias.float()
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], rows)

    def _rows_of_threads(self, threads: int) -> list[tuple[int, int, int, int]]:
        """For each thread its first row, the one after its last, and the same of values."""
        if threads not in self._parts:
            rows, columns = self.shape
            ends = [rows * number // threads for number in range(threads + 1)]
            starts = [count_bits(self.bits.numpy()[: row * columns // 8]) for row in ends]
            self._parts[threads] = list(zip(ends, ends[1:], starts, starts[1:], strict=False))
        return self._parts[threads]

    def extra_repr(self) -> str:
        """Shape and what is kept."""
        rows, columns = self.shape
        return f"in_features={columns}, out_features={rows}, kept={len(self.values) / (rows * columns):.0%}"


def use_kernel(device: str, rows: int, differentiated: bool) -> bool:
    """Whether the decode kernel takes inputs of so many rows; it has no gradient."""
    return device == "cuda" and 1 <= rows <= DECODE_ROWS and not differentiated and find_spec("triton") is not None


def use_native(values: Tensor, columns: int, rows: int, differentiated: bool) -> bool:
    """Whether inputs of so many rows are multiplied with the packed weight on the CPU."""
    few = 1 <= rows <= native.PRODUCT_ROWS and not differentiated
    return few and values.device.type == "cpu" and native.can_multiply(columns, values.dtype)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def unpack_on_device(values: Tensor, bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight, (out, in), by PyTorch's operations, where its parts are.

    Args:
        values: (kept,).
        bits: uint8, (⌈out · in / 8⌉,).
        shape: out, in.
    """
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = ((bits[:, None] >> places) & 1).view(-1)[: shape[0] * shape[1]].bool()
    return values.new_zeros(shape[0] * shape[1]).masked_scatter_(kept, values).view(shape)


def block_starts(bits: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """For each row and block of columns, how many bits are set before it: (out, ⌈in / block⌉).

    int32; int64 where there are 2³¹ weights or more.

    Args:
        bits: uint8, (⌈out · in / 8⌉,), row after row.
        shape: out, in.
        block: columns of a block.
    """
    rows, columns = shape
    kind = torch.int32 if rows * columns < 2**31 else torch.int64
    counts = torch.from_numpy(POPCOUNT).to(bits.device)
    before = counts[bits.int()].cumsum(0, dtype=kind) - counts[bits.int()]  # each byte: set bits before it
    place = torch.arange(rows, device=bits.device)[:, None] * columns + torch.arange(
        0, columns, block, device=bits.device
    )
    byte = place >> 3
    lower = bits[byte].int() & ((1 << (place & 7)) - 1)  # bits of the byte that are before the block
    return (before[byte] + counts[lower]).to(kind)
