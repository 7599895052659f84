"""What linears with packed weights share: their buffers, and what products keep ready for them."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from llm_barber import native
from llm_barber.runtime import on_gpu
from llm_barber.runtime.products import report_other_bits


class PackedModule(nn.Module, ABC):
    """A module with a packed weight.

    `shape`: of the weight, (out, in). `values`: kept values, (kept,). `bits`: uint8, (⌈out · in / 8⌉,), which weights
    are kept. `bias`: (out,), or None.
    """

    values: Tensor
    bits: Tensor
    kept_ready: tuple[str, ...] = ("_ready",)  # names of the dictionaries that keep what products on CPUs need
    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], values: Tensor, bits: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("values", values)
        self.register_buffer("bits", bits)
        self.register_parameter("bias", bias)
        self._places = on_gpu.PlacesOnGpu(shape)
        self.__dict__ |= self._nothing_ready()
        native.library()  # it has to be loaded before the process forks, to know a forked process

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The unpacked weight, (out, in)."""

    def _nothing_ready(self) -> dict[str, Any]:
        """Attributes that keep what products on CPUs need, before the first product."""
        return {name: {} for name in self.kept_ready}

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, which has pointers of its own."""
        return self.__dict__ | self._nothing_ready()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy; on a GPU, find what its kernels need."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load buffers in place: other bits have other starts."""
        super()._load_from_state_dict(*arguments)
        report_other_bits(self.values, self.bits, arguments)
        self._places = on_gpu.PlacesOnGpu(self.shape)
        self.__dict__ |= self._nothing_ready()
        self.prepare()

    def _apply(self, *arguments: Any, **named: Any) -> "PackedModule":
        """Move or convert the buffers; on a GPU, find what its kernels need."""
        super()._apply(*arguments, **named)  # type: ignore[no-untyped-call]
        self.prepare()
        return self

    def prepare(self) -> None:
        """Find what the kernels of a GPU need, after `values` and `bits` have got there."""
        self._places.prepare(self.bits)

    def dense(self) -> nn.Linear:
        """An ordinary linear with the unpacked weight and the bias, without gradients of the weight."""
        rows, columns = self.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shape, and the share of weights that is kept."""
        rows, columns = self.shape
        return f"in_features={columns}, out_features={rows}, kept={len(self.values) / (rows * columns):.0%}"
