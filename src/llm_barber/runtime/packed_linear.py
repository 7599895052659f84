"""A linear whose weight stays packed in memory: kept values and a bit a weight, for every encoding."""

import torch
from torch import Tensor, nn

from llm_barber.checkpoint.bits import as_integers, put_kept
from llm_barber.checkpoint.encoding import Packed, bitmask
from llm_barber.native import unrounded
from llm_barber.native.rows import Parts
from llm_barber.native.threads import threads_for
from llm_barber.runtime import on_gpu
from llm_barber.runtime.packed_module import PackedModule
from llm_barber.runtime.products import (
    count_rows,
    is_differentiated,
    is_plain,
    multiply_unpacked,
    outside_transforms,
    shared_buffer,
)


class PackedLinear(PackedModule):
    """A drop-in for `nn.Linear` without gradients of its weight.

    On the CPU the packed weight is multiplied with few rows of inputs where `llm_barber.native` was built: 4 with AVX2,
    16 with AVX-512 (8 of bfloat16 without its BF16), any number of bfloat16 with AMX. Otherwise the weight is
    unpacked into a buffer that all linears share in a thread; in C a few rows at a time, which are multiplied while
    they are in the cache. On CUDA with Triton, up to `on_gpu.DECODE_ROWS` rows of inputs go through the decode kernel,
    which does not unpack; it was not run on a real GPU.

    Buffers may be moved, replaced and loaded, but `bits` must not be written in place.

    Args:
        packed: the weight, (out, in).
        bias: a parameter, (out,), or None; it may still be empty.
        checked: the parts of the weight fit together, and its places are a bit mask, as `read_packed` reads it.

    Raises:
        ValueError: the parts of the weight do not fit together.
    """

    kept_ready = ("_ready", "_parts")
    _ready: dict[tuple[int, bool], unrounded.Weight]  # by number of PyTorch's threads, and without a bias
    _parts: dict[int, tuple[Tensor, Parts]]  # by number of parts: the bits, and the rows of each part

    def __init__(self, packed: Packed, bias: nn.Parameter | None, checked: bool = False) -> None:
        bits = packed.places if checked else torch.from_numpy(bitmask(packed))
        super().__init__(packed.shape, packed.values, bits, bias)
        self.prepare()

    def gpu_weight(self) -> on_gpu.GpuWeight:
        """The weight as the GPU's kernels read it."""
        values = self.values
        return on_gpu.GpuWeight(self._places.of(self.bits), values, None, 0, self.shape[1], values.dtype)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, (out, in)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().unpack()
        if not self.values.is_cpu:
            return on_gpu.unpack_on_device(self.values, self.bits, self.shape)
        with outside_transforms():
            weight = self.values.new_empty(self.shape)
            self._unpack(weight)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias, (…, out)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().multiply(inputs, self.bias)
        bias = self._parameters["bias"]
        differentiated = is_differentiated(inputs, bias)
        columns = self.shape[1]
        rows = count_rows(inputs, columns)
        weight = None if differentiated else self._ready_weight(bias)
        plain = not differentiated and is_plain(self.values.dtype)
        if weight is not None and rows and inputs.dtype is weight.dtype and inputs.is_cpu and plain:
            return weight.multiply(inputs) if rows <= weight.fast_rows else multiply_unpacked(weight, inputs, bias)
        if differentiated or not self.values.is_cpu:
            return nn.functional.linear(inputs, self.weight, self.bias)  # autograd keeps the weight: it is not shared
        shared = shared_buffer(self.values.dtype, self.shape[0] * columns).view(self.shape)
        self._unpack(shared)
        return nn.functional.linear(inputs, shared, self.bias)

    def _ready_weight(self, bias: Tensor | None) -> unrounded.Weight | None:
        """The weight, ready for products in C; None where these cannot be used."""
        values, bits, threads = self._buffers["values"], self._buffers["bits"], torch.get_num_threads()
        assert values is not None
        assert bits is not None
        weight = self._ready.get((threads, bias is None))
        if weight is not None and weight.is_of(values, bits, bias):
            return weight
        if not values.is_cpu or not unrounded.can_multiply(self.shape[1], values.dtype, values.dtype):
            return None
        if bias is not None and (
            (bias.dtype, bias.device) != (values.dtype, values.device) or not bias.is_contiguous()
        ):
            return None
        weight = unrounded.Weight(values, bits, bias, self.shape, self._divided(self._threads()), threads)
        self._ready[threads, bias is None] = weight
        return weight

    def _unpack(self, into: Tensor) -> None:
        """Write the weight, on the CPU."""
        weight = self._ready_weight(None)
        if weight is None:
            put_kept(as_integers(self.values), self.bits.numpy(), as_integers(into.view(-1)))
        else:
            weight.unpack(0, self.shape[0], into)

    def _threads(self) -> int:
        """Number of threads of a product."""
        return threads_for(self.shape[0], self.values.shape[0])

    def _divided(self, threads: int) -> Parts:
        """Rows of each thread."""
        bits, parts = self._parts.get(threads, (None, None))
        if parts is None or bits is not self.bits:
            parts = Parts.of(self.bits, self.shape, threads)
            self._parts[threads] = self.bits, parts
        return parts
