"""LoRA whose product is masked: what training sees is what is merged into a pruned linear.

A pruned linear with weight W, mask M and LoRA computes x·(W + s·B·A)ᵀ, which has no zeros. Here it computes
x·(W + M∘(s·B·A))ᵀ. PEFT calls `MaskedLora` in its forward pass and when it merges, so that its `merge_and_unload` keeps
the zeros, too. This file needs PEFT, and is imported where PEFT was.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_barber.errors import SettingsError


class MaskedLora(LoraVariant):  # type: ignore[misc]
    """LoRA of a pruned linear, as PEFT computes and merges it.

    The nonzeros of the frozen weight are the mask: it takes no memory between calls, and each part of a sharded weight
    has its own. The masked product, as large as the weight, is computed again in the backward pass.
    """

    @staticmethod
    def init(module: Linear, adapter_name: str, **_: Any) -> None:
        """Do nothing: PEFT calls it when it makes an adapter's matrices anew."""

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Add the masked product of the inputs, (…, in), to the linear's outputs, (…, out)."""
        outputs: Tensor
        first, second = module.lora_A[active_adapter].weight, module.lora_B[active_adapter]
        inputs = module.lora_dropout[active_adapter](x)
        weight = module.get_base_layer().weight
        settings = (module.scaling[active_adapter], module.fan_in_fan_out)
        if torch.is_grad_enabled():
            outputs = checkpoint(
                _product, inputs, first, second.weight, weight, *settings, use_reentrant=False, preserve_rng_state=False
            )
        else:
            outputs = _product(inputs, first, second.weight, weight, *settings)
        if second.bias is not None:
            outputs = outputs + second.bias * settings[0]
        return result + outputs

    @staticmethod
    def merge_safe(module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the masked product added, a new tensor."""
        return _merged(module, active_adapter, orig_weight, 1)

    @staticmethod
    def merge_unsafe(module: Linear, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the masked product to the weight, in place."""
        orig_weight.data.copy_(_merged(module, active_adapter, orig_weight.data, 1))

    @staticmethod
    def unmerge(module: Linear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the masked product, a new tensor."""
        return _merged(module, active_adapter, orig_weight, -1)


def _product(inputs: Tensor, first: Tensor, second: Tensor, weight: Tensor, scaling: float, transposed: bool) -> Tensor:
    """Inputs times the masked product of LoRA's matrices.

    Args:
        inputs: (…, in).
        first: A, (rank, in).
        second: B, (out, rank).
        weight: the pruned weight, (out, in), or (in, out) if `transposed`.
        scaling: of the product.
        transposed: the weight is that of a `Conv1D`.
    """
    kept = weight.t() != 0 if transposed else weight != 0
    return nn.functional.linear(inputs, torch.where(kept, (second @ first) * scaling, 0.0))


@torch.no_grad()
def _merged(module: Linear, adapter: str, weight: Tensor, sign: int) -> Tensor:
    """The weight plus or minus the masked product, added in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    first, second = module.lora_A[adapter].weight.to(wide), module.lora_B[adapter].weight.to(wide)
    product: Tensor = (second @ first) * (sign * module.scaling[adapter])
    product = product.t() if module.fan_in_fan_out else product
    return (weight.to(wide) + product.to(weight.device).masked_fill(weight == 0, 0)).to(weight.dtype)


def mask_adapters(model: nn.Module, pruned: Iterable[nn.Module]) -> Callable[[], None]:
    """Mask the products of all adapters of pruned linears.

    Args:
        model: of PEFT, or any module.
        pruned: the modules that have pruned weights.

    Returns:
        A function that undoes it.

    Raises:
        SettingsError: an adapter of a pruned linear would fill its zeros, and cannot be masked.
    """
    modules = {id(module) for module in pruned}
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and id(layer.get_base_layer()) in modules
    ]
    for name, layer in layers:
        if not isinstance(layer, IA3Layer):  # it multiplies, which keeps zeros
            _check(name, layer)
    masked = [layer for _, layer in layers if isinstance(layer, LoraLayer)]
    for layer in masked:
        for adapter in layer.lora_A:
            layer.lora_variant.setdefault(adapter, MaskedLora())

    def undo() -> None:
        for layer in masked:
            for adapter, variant in list(layer.lora_variant.items()):
                if isinstance(variant, MaskedLora):
                    del layer.lora_variant[adapter]

    return undo


def _check(name: str, layer: BaseTunerLayer) -> None:
    """Refuse an adapter that is not plain LoRA of a linear, or that is merged already."""
    kinds = {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()} - {MaskedLora.__name__}
    if type(layer) is not Linear or kinds:
        kind = ", ".join(sorted(kinds)) or f"{type(layer).__module__}.{type(layer).__name__}"
        raise SettingsError(
            f"the adapter of {name} would fill its zeros ({kind})",
            "plain LoRA of linears can be masked: LoraConfig without use_dora and other variants, on weights that are "
            "not quantised",
        )
    if layer.merged:
        raise SettingsError(
            f"the adapter of {name} is merged, so that its zeros are filled already", "call unmerge_adapter() first"
        )
