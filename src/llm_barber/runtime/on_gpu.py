"""Products of packed linears on a GPU, by Triton's kernels: which kernel takes a product, and what it reads."""

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from llm_barber.gpu.kernels import OLDEST_GPU, gpu_number
from llm_barber.gpu.out_of_memory import is_out_of_memory
from llm_barber.runtime.kernels.layout import DECODE_ROWS, Places, find_places
from llm_barber.runtime.kernels.operators import packed_product, unpacked
from llm_barber.runtime.products import is_differentiated, is_plain

GROUPS = 32  # a scale of int8 values is for a multiple of so many columns, or for the whole row
INSTEAD = "every product with a packed weight unpacks it"


def has_kernels(device: torch.device) -> bool:
    """Test whether Triton's kernels run on a device; warn, once for each GPU, why they do not."""
    if device.type != "cuda":
        return False
    return _runs_kernels(gpu_number(device))


@cache
def _runs_kernels(index: int) -> bool:
    """Test a GPU by its number: a first launch compiles C, which fails without a compiler or Python's headers."""
    if find_spec("triton") is None:
        warnings.warn(f"without Triton {INSTEAD}: pip install triton", stacklevel=4)
        return False
    if torch.cuda.get_device_capability(index) < OLDEST_GPU:
        name = torch.cuda.get_device_name(index)
        warnings.warn(f"Triton's kernels need compute capability 8.0: on {name} {INSTEAD}", stacklevel=4)
        return False
    try:
        _launch(torch.device("cuda", index))
    except Exception as error:
        if is_out_of_memory(error):
            raise  # and is not remembered
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton's kernels do not run here, so that {INSTEAD} ({type(error).__name__}: {reason}); Triton needs a C "
            "compiler and Python's headers (Debian: gcc, python3-dev)",
            stacklevel=4,
        )
        return False
    return True


def _launch(device: torch.device) -> None:
    """Unpack a small weight, of which half is kept.

    Raises:
        Exception: whatever Triton raises.
    """
    bits = torch.full((8,), 0b0101_0101, dtype=torch.uint8, device=device)
    values = torch.ones(32, dtype=torch.bfloat16, device=device)
    GpuWeight(find_places(bits, (1, 64)), values, None, 0, 64, torch.bfloat16).unpack()


@dataclass(frozen=True)
class GpuWeight:
    """A packed weight as the kernels read it.

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
        """inputs · Wᵀ + bias, (…, out): a few rows of inputs with the packed weight, more with the unpacked one.

        Args:
            inputs: (…, in).
            bias: (out,), or None.
        """
        if is_plain(inputs.dtype, "cuda") and not is_differentiated(inputs, bias) and self.can_decode(inputs, bias):
            return self.decode(inputs, bias)
        weight = self.unpack()
        return nn.functional.linear(inputs, weight.to(inputs.dtype) if self.group else weight, bias)

    def can_decode(self, inputs: Tensor, bias: Tensor | None) -> bool:
        """Test whether the decode kernels take these inputs; PyTorch's linear takes others, or refuses them."""
        if inputs.shape[-1] != self.columns or inputs.device != self.values.device:
            return False
        if bias is not None and bias.dtype != inputs.dtype:
            return False
        if not 1 <= inputs.numel() // self.columns <= DECODE_ROWS.get(inputs.dtype, 0):
            return False
        if self.group:
            return self.group % GROUPS == 0 or self.group >= self.columns
        return inputs.dtype == self.values.dtype

    def decode(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """inputs · Wᵀ + bias, (…, out), by the decode kernels, which take them."""
        places = self.places
        return packed_product(  # type: ignore[no-any-return]
            self.values, places.words, places.starts, places.row_starts, inputs, bias, self.scales, self.group
        )

    def unpack(self) -> Tensor:
        """The weight, (out, in), of `dtype`."""
        places = self.places
        return unpacked(  # type: ignore[no-any-return]
            self.values,
            places.words,
            places.starts,
            places.row_starts,
            self.scales,
            self.group,
            self.columns,
            self.dtype,
        )


class PlacesOnGpu:
    """Places of the values of a linear that may move or get other bits: found when it moves, not by a product."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._places: Places | None = None
        self._device: torch.device | None = None
        self._runs = False

    def __reduce__(self) -> tuple[type["PlacesOnGpu"], tuple[tuple[int, int]]]:
        """Start a copy without places: it may be read on another device."""
        return PlacesOnGpu, (self._shape,)

    def of(self, bits: Tensor) -> Places:
        """Places of the values of these bits."""
        if self._places is None or self._places.bits is not bits:
            self._places = find_places(bits, self._shape)
        return self._places

    def usable(self, bits: Tensor) -> bool:
        """Test whether the kernels run where the bits are; asked again only when these are somewhere else."""
        if bits.device != self._device:
            self._device, self._runs = bits.device, has_kernels(bits.device)
        return self._runs

    def prepare(self, bits: Tensor) -> None:
        """Find the places where kernels will read them; forget them elsewhere."""
        self._device = None
        if self.usable(bits):
            self.of(bits)
        else:
            self._places = None
