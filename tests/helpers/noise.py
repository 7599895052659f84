"""Products that round otherwise, as on another device: a dispatch mode adds noise to their results."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::sum", "aten::mean",
    "aten::linalg_vector_norm",
)  # fmt: skip
# Noise of a product's results, relative to their root mean square. Sums of a thousand float32 numbers in two orders
# differ by about 2e-7; inputs with TF32's ten bits change a product by about 3e-4.
REORDERED, TF32 = 1e-6, 3e-4
HALF = 2.0**-9  # for products in bfloat16: half a step, relative to each result


class Noise(TorchDispatchMode):
    """Add noise to float32 results of products, and round bfloat16 results up or down at random.

    Args:
        size: of the noise of float32 results, relative to their root mean square.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self._size = size
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, function: Any, _: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function._schema.name not in PRODUCTS or "out" in (named or {}):
            return result
        if isinstance(result, torch.Tensor):
            return self._changed(result)
        return tuple(self._changed(part) if isinstance(part, torch.Tensor) else part for part in result)

    def _changed(self, values: torch.Tensor) -> torch.Tensor:
        if not values.is_floating_point() or not values.numel():
            return values
        noise = torch.empty(values.shape).uniform_(-1, 1, generator=self._generator)
        if values.dtype == torch.float32:
            return values + self._size * values.square().mean().sqrt() * noise
        if values.dtype == torch.float64:
            return values
        return (values.float() * (1 + HALF * noise)).to(values.dtype)
