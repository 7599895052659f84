"""A linear whose weight stays packed in memory with values rounded to int8: values, a bit a weight, and scales."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from llm_barber.checkpoint.encoding import Encoding, Packed, bitmask
from llm_barber.checkpoint.rounding import Rounded, check_rounded, restore_rows, unpack_rounded
from llm_barber.native.rounded import DTYPES, Kernel, Weight, find_kernel
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


class RoundedLinear(PackedModule):
    """A drop-in for `nn.Linear` without gradients of its weight.

    On CPUs with AVX-512 (VBMI2 and VNNI) up to 8 rows of inputs are rounded, too, and multiplied with the packed weight
    (`Weight.multiply` says how). AMX multiplies more rows in bfloat16, and AVX2 up to 4; neither rounds inputs. On
    CUDA, Triton's kernels multiply a few rows with the int8 values and do not round inputs; they were not run on a real
    GPU. Otherwise each product unpacks the weight, with AVX-512 and AVX2 a few rows at a time, and does not round
    inputs.

    Args:
        rounded: the weight, (out, in).
        bias: (out,), or None; it may still be empty.
        dtype: of `weight`, which the model computes in; None: the dtype that the weight was packed from.
        checked: the parts of the weight fit together, and its places are a bit mask, as `read_packed` reads it.

    Raises:
        ValueError: the parts of the weight do not fit together.
    """

    scales: Tensor
    _ready: dict[tuple[int, torch.dtype, bool], Weight]  # by threads of PyTorch, dtype of inputs, and without a bias

    def __init__(self, rounded: Rounded, bias: Any, dtype: torch.dtype | None = None, checked: bool = False) -> None:
        if checked:
            bits = rounded.packed.places
        else:
            bits = torch.from_numpy(bitmask(rounded.packed))
            check_rounded(rounded)
        super().__init__(rounded.packed.shape, rounded.packed.values, bits, bias)
        self.group, self.packed_dtype, self.dtype = rounded.group, rounded.dtype, dtype or rounded.dtype
        # Integers, so that a change of the model's dtype leaves the scales as they are.
        self.register_buffer("scales", rounded.scales.contiguous().view(torch.int16))
        self.prepare()

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Change dtype or device as `nn.Module.to` does; values, bits and scales keep their dtypes."""
        self.dtype = function(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(function, recurse)
        return self

    def gpu_weight(self) -> on_gpu.GpuWeight:
        """The weight as the GPU's kernels read it."""
        places, scales = self._places.of(self.bits), self.scales.view(torch.bfloat16)
        return on_gpu.GpuWeight(places, self.values, scales, self.group, self.shape[1], self.packed_dtype)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, (out, in)."""
        return self._unpack(None).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias, (…, out)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().multiply(inputs, self.bias)
        bias = self._parameters["bias"]
        differentiated = is_differentiated(inputs, bias)
        columns = self.shape[1]
        rows = count_rows(inputs, columns)
        plain = not differentiated and is_plain(self.dtype)
        if rows and plain and inputs.is_cpu and inputs.dtype is self.dtype:
            weight = self._ready_weight(bias, inputs.dtype)
            if weight is not None and rows <= weight.most_rows:
                return weight.multiply(inputs)
            if weight is not None and weight.dtype is self.packed_dtype:
                return multiply_unpacked(weight, inputs, bias)
        # Autograd keeps the weight: it is not shared then.
        into = (
            None
            if differentiated or not self.values.is_cpu
            else shared_buffer(self.packed_dtype, self.shape[0] * columns).view(self.shape)
        )
        return nn.functional.linear(inputs, self._unpack(into).to(inputs.dtype), bias)

    def _ready_weight(self, bias: Tensor | None, dtype: torch.dtype) -> Weight | None:
        """The weight, ready for products with inputs of `dtype`; None where there are none."""
        values, bits, scales = (self._buffers[name] for name in ("values", "bits", "scales"))
        assert values is not None
        assert bits is not None
        assert scales is not None
        key = torch.get_num_threads(), dtype, bias is None
        weight = self._ready.get(key)
        if weight is not None and weight.is_of(values, bits, scales, bias):
            return weight
        if not values.is_cpu or dtype not in DTYPES or find_kernel(self.shape[1], self.group) == Kernel.NUMPY:
            return None
        if bias is not None and ((bias.dtype, bias.device) != (dtype, values.device) or not bias.is_contiguous()):
            return None
        threads = threads_for(self.shape[0], values.shape[0])
        parts = Parts.of(bits, self.shape, threads)
        weight = Weight(values, bits, scales, bias, self.shape[1], self.group, dtype, parts)
        self._ready[key] = weight
        return weight

    def _unpack(self, into: Tensor | None) -> Tensor:
        """The weight as it was packed, in new memory or in `into`, (out, in)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().unpack()
        with outside_transforms():
            scales = self.scales.view(torch.bfloat16)
            if not self.values.is_cpu:
                quotients = on_gpu.unpack_on_device(self.values, self.bits, self.shape)
                return restore_rows(quotients, scales, self.group, self.packed_dtype)
            unpacked = torch.empty(self.shape, dtype=self.packed_dtype, device="cpu") if into is None else into
            weight = self._ready_weight(None, self.packed_dtype)
            if weight is not None:
                weight.unpack(0, self.shape[0], unpacked)
                return unpacked
            packed = Packed(self.shape, Encoding.BITMASK, self.values, self.bits)
            return unpack_rounded(Rounded(packed, scales, self.group, self.packed_dtype), lambda *_: unpacked)

    def extra_repr(self) -> str:
        """Shape, the share of weights that is kept, and the columns of a scale."""
        return f"{super().extra_repr()}, int8 by {self.group} columns"
