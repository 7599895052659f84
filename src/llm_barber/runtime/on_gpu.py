"""Products of packed linears on a GPU: few rows of inputs by Triton's kernel, more with the unpacked weight."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from llm_barber.checkpoint.bits import POPCOUNT
from llm_barber.checkpoint.rounding import restore_rows
from llm_barber.runtime.products import is_differentiated, is_plain

OLDEST_GPU = (8, 0)  # compute capability: Triton compiles bfloat16 for no older GPU
DECODE_ROWS = 4  # most rows of inputs that the kernel takes: it reads the weight for each
WORD, CHUNK = 64, 8  # columns of a word of bits; columns that have one scale at most


@cache
def has_kernels(device: torch.device) -> bool:
    """Test whether a GPU runs Triton's kernels; Triton is an extra."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU


@dataclass(frozen=True)
class Places:
    """Places of a weight's kept values, (out, in), on the weight's device.

    The value of row r and column c has the number starts[r, c / 64] + the set bits of words[r, c / 64] below c mod 64.

    Attributes:
        bits: as packed; identifies the weight that the places are of.
        words: int64, (out, in / 64).
        starts: int64, (out, in / 64), number of values before each word.
    """

    bits: Tensor
    words: Tensor
    starts: Tensor


def find_places(bits: Tensor, shape: tuple[int, int]) -> Places:
    """Words and starts of a weight, (out, in) with whole words, from its bits, uint8, the first column lowest."""
    words = bits.clone().view(torch.int64).view(shape[0], shape[1] // WORD)
    counts = torch.from_numpy(POPCOUNT).to(bits.device)[bits.int()].view(-1, WORD // 8).sum(1, dtype=torch.int64)
    return Places(bits, words, (counts.cumsum(0) - counts).view(words.shape))


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


@dataclass(frozen=True)
class GpuWeight:
    """A packed weight on a GPU.

    `places`: of its values. `values`: (kept,). `scales`: of int8 values, bfloat16, (out, ⌈in / group⌉); else None.
    `group`: columns of a scale, or 0. `columns`: in. `dtype`: of the unpacked weight.
    """

    places: Places
    values: Tensor
    scales: Tensor | None
    group: int
    columns: int
    dtype: torch.dtype

    def multiply(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """inputs · Wᵀ + bias, (…, out).

        Args:
            inputs: (…, in).
            bias: (out,), or None.
        """
        if is_plain(inputs.dtype, "cuda") and not is_differentiated(inputs, bias) and self.can_decode(inputs, bias):
            from llm_barber.runtime.decode_kernel import decode_product

            places = self.places
            return decode_product(self.values, places.words, places.starts, inputs, bias, self.scales, self.group)
        weight = self.unpack()
        return nn.functional.linear(inputs, weight.to(inputs.dtype) if self.group else weight, bias)

    def can_decode(self, inputs: Tensor, bias: Tensor | None) -> bool:
        """Test whether the kernel takes these inputs; PyTorch's linear takes others, or refuses them."""
        if inputs.shape[-1] != self.columns or inputs.device != self.values.device:
            return False
        if bias is not None and bias.dtype != inputs.dtype:
            return False
        if not 1 <= inputs.numel() // self.columns <= DECODE_ROWS:
            return False
        return self.group % CHUNK == 0 if self.group else inputs.dtype == self.values.dtype

    def unpack(self) -> Tensor:
        """The weight, (out, in), of `dtype`."""
        weight = unpack_on_device(self.values, self.places.bits, (len(self.places.words), self.columns))
        return weight if self.scales is None else restore_rows(weight, self.scales, self.group, self.dtype)


class PlacesOnGpu:
    """Places of the values of a linear that may move or get other bits: found when it moves, not by a product."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._places: Places | None = None

    def __reduce__(self) -> tuple[type["PlacesOnGpu"], tuple[tuple[int, int]]]:
        """Start a copy without places: it may be read on another device."""
        return PlacesOnGpu, (self._shape,)

    def of(self, bits: Tensor) -> Places:
        """Places of the values of these bits."""
        if self._places is None or self._places.bits is not bits:
            self._places = find_places(bits, self._shape)
        return self._places

    def usable(self, bits: Tensor) -> bool:
        """Test whether the kernel runs where the bits are, and takes rows of this length."""
        return self._shape[1] % WORD == 0 and has_kernels(bits.device)

    def prepare(self, bits: Tensor) -> None:
        """Find the places where the kernel will read them, so that a CUDA graph can capture products."""
        self._places = None
        if self.usable(bits):
            self.of(bits)
