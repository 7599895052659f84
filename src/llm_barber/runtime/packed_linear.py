"""A linear whose weight stays packed in memory: kept values, float or int8 with scales, and a bit a weight."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from llm_barber import native
from llm_barber.checkpoint.bits import as_integers, put_kept
from llm_barber.checkpoint.encoding import Encoding, Packed, bitmask
from llm_barber.checkpoint.rounding import Rounded, check_rounded, restore_rows, unpack_rounded
from llm_barber.native.threads import threads_for
from llm_barber.native.weight import Parts, Weight, can_unpack
from llm_barber.runtime import on_gpu
from llm_barber.runtime.on_gpu import unpack_on_device
from llm_barber.runtime.products import is_differentiated, is_plain, multiply_unpacked, shared_buffer


class PackedLinear(nn.Module):
    """A drop-in for `nn.Linear` without gradients of its weight.

    On the CPU the packed weight is multiplied with few rows of inputs where `llm_barber.native` was built: 4 by AVX2
    (float values), 16 by AVX-512 (8 with int8 values, by VNNI, which rounds the inputs, too: `Weight.multiply` says
    how), any number of bfloat16 by AMX. Otherwise the weight is unpacked into a buffer that all linears share in a
    thread; in C a few rows at a time, which are multiplied while they are in the cache. On CUDA with Triton, a few rows
    of inputs go through the decode kernel, which does not unpack; it was not run on a real GPU.

    Buffers may be moved, replaced and loaded, but `bits` must not be written in place.

    Attributes:
        shape: of the weight, (out, in).
        values: kept values, (kept,).
        bits: uint8, (⌈out · in / 8⌉,), which weights are kept.
        scales: bits of bfloat16 scales of int8 values, int16, (out, ⌈in / group⌉), so that a change of the model's
            dtype leaves them as they are; or None.
        bias: (out,), or None.

    Args:
        packed: the weight, (out, in).
        bias: a parameter, (out,), or None; it may still be empty.
        dtype: of `weight`, if its values are int8; None: the dtype that it was packed from.
        checked: the parts of the weight fit together, and its places are a bit mask, as `read_packed` reads it.

    Raises:
        ValueError: the parts of the weight do not fit together.
    """

    values: Tensor
    bits: Tensor
    scales: Tensor | None
    bias: nn.Parameter | None
    _ready: dict[tuple[int, torch.dtype, bool], Weight]  # by threads of PyTorch, dtype of inputs, and without a bias

    def __init__(
        self,
        packed: Packed | Rounded,
        bias: nn.Parameter | None,
        dtype: torch.dtype | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__()
        rounded = packed if isinstance(packed, Rounded) else None
        inner = packed.packed if isinstance(packed, Rounded) else packed
        if not checked and rounded is not None:
            check_rounded(rounded)
        self.shape, self.group = inner.shape, 0 if rounded is None else rounded.group
        self._packed_dtype = None if rounded is None else rounded.dtype
        self._computed_dtype = None if rounded is None else dtype or rounded.dtype
        self.register_buffer("values", inner.values)
        self.register_buffer("bits", inner.places if checked else torch.from_numpy(bitmask(inner)))
        self.register_buffer("scales", None if rounded is None else rounded.scales.contiguous().view(torch.int16))
        self.register_parameter("bias", bias)
        self._places = on_gpu.PlacesOnGpu(self.shape)
        self._ready = {}
        native.library()  # it has to be loaded before the process forks, to know a forked process
        self.prepare()

    @property
    def dtype(self) -> torch.dtype:
        """Of `weight`, which the model computes in."""
        return self._computed_dtype or self.values.dtype

    @property
    def packed_dtype(self) -> torch.dtype:
        """Of the weight that was packed."""
        return self._packed_dtype or self.values.dtype

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, (out, in)."""
        return self._unpack(None).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs · Wᵀ + bias, (…, out)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().multiply(inputs, self.bias)
        bias, dtype, columns = self._parameters["bias"], self.dtype, self.shape[1]
        differentiated = is_differentiated(inputs, bias)
        plain = not differentiated and is_plain(dtype) and inputs.is_cpu and inputs.dtype is dtype
        if plain and inputs.shape[-1] == columns and not inputs.is_neg():
            rows, weight = inputs.numel() // columns, self._ready_weight(dtype, bias)
            if weight is not None and 0 < rows <= weight.most_rows:
                return weight.multiply(inputs)
            if weight is not None and rows and dtype is self.packed_dtype:
                return multiply_unpacked(weight, inputs, bias)
        # Autograd keeps the weight: it is not shared then.
        shared = not differentiated and self.values.is_cpu
        into = shared_buffer(self.packed_dtype, self.shape[0] * columns).view(self.shape) if shared else None
        return nn.functional.linear(inputs, self._unpack(into).to(dtype), bias)

    def _ready_weight(self, dtype: torch.dtype, bias: Tensor | None) -> Weight | None:
        """The weight, ready for products in C with inputs of `dtype`; None where these cannot be used."""
        values, bits, scales = (self._buffers[name] for name in ("values", "bits", "scales"))
        assert values is not None
        assert bits is not None
        key = torch.get_num_threads(), dtype, bias is None
        weight = self._ready.get(key)
        if weight is not None and weight.is_of(values, bits, scales, bias):
            return weight
        if not values.is_cpu or not can_unpack(self.shape[1], dtype, self.group):
            return None
        if bias is not None and ((bias.dtype, bias.device) != (dtype, values.device) or not bias.is_contiguous()):
            return None
        parts = Parts.of(bits, self.shape, threads_for(self.shape[0], len(values)))
        weight = self._ready[key] = Weight(values, bits, scales, bias, self.shape, self.group, dtype, parts)
        return weight

    def _unpack(self, into: Tensor | None) -> Tensor:
        """The weight as it was packed, in new memory or in `into`, (out, in)."""
        if self._places.usable(self.bits):
            return self.gpu_weight().unpack()
        with torch._C._DisableFuncTorch():  # a running transform of `torch.func` does not wrap new tensors
            scales = None if self.scales is None else self.scales.view(torch.bfloat16)
            if not self.values.is_cpu:
                weight = unpack_on_device(self.values, self.bits, self.shape)
                return weight if scales is None else restore_rows(weight, scales, self.group, self.packed_dtype)
            unpacked = torch.empty(self.shape, dtype=self.packed_dtype, device="cpu") if into is None else into
            ready = self._ready_weight(self.packed_dtype, None)
            if ready is not None:
                ready.unpack(0, self.shape[0], unpacked)
            elif scales is None:
                put_kept(as_integers(self.values), self.bits.numpy(), as_integers(unpacked.view(-1)))
            else:
                packed = Packed(self.shape, Encoding.BITMASK, self.values, self.bits)
                unpack_rounded(Rounded(packed, scales, self.group, self.packed_dtype), lambda *_: unpacked)
            return unpacked

    def dense(self) -> nn.Linear:
        """An ordinary linear with the unpacked weight and the bias, without gradients of the weight."""
        linear = nn.Linear(self.shape[1], self.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def gpu_weight(self) -> on_gpu.GpuWeight:
        """The weight as the GPU's kernels read it."""
        scales = None if self.scales is None else self.scales.view(torch.bfloat16)
        places, columns = self._places.of(self.bits), self.shape[1]
        return on_gpu.GpuWeight(places, self.values, scales, self.group, columns, self.packed_dtype)

    def prepare(self) -> None:
        """Find what the kernels of a GPU need, after `values` and `bits` have got there."""
        self._places.prepare(self.bits)

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, which has pointers of its own."""
        return self.__dict__ | {"_ready": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy; on a GPU, find what its kernels need."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load buffers in place: other bits have other starts."""
        super()._load_from_state_dict(*arguments)
        self._places, self._ready = on_gpu.PlacesOnGpu(self.shape), {}
        self.prepare()

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """Change dtype or device as `nn.Module.to` does; int8 values, bits and scales keep their dtypes."""
        if self._computed_dtype is not None:
            self._computed_dtype = function(torch.empty(0, dtype=self._computed_dtype, device="cpu")).dtype
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self

    def extra_repr(self) -> str:
        """Shape, the share of weights that is kept, and the columns of a scale."""
        rows, columns = self.shape
        rounded = f", int8 by {self.group} columns" if self.group else ""
        return f"in_features={columns}, out_features={rows}, kept={len(self.values) / (rows * columns):.0%}{rounded}"
