"""2:4 linears in PyTorch's semi-structured format, for the tensor cores of GPUs since Ampere.

The gain is for many rows of inputs (prefill, batches); for one row (decoding a single sequence) expect none, or a loss.
Pure functions, tested on CPUs, decide which linears are converted; the product itself is untested on a real GPU.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError, SettingsError
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.pattern import NofM
from llm_barber.messages import first_names

# Rows and columns must be multiples of these: both of PyTorch's backends, CUTLASS and cuSPARSELt, take them.
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
CAPABILITY = (8, 0)  # the least compute capability: Ampere
HINT = "load it dense, or keep_packed=True"


@dataclass(frozen=True)
class SemiStructured:
    """Linears that were converted, and the reasons why others stay dense.

    `load` sets it as `model.semi_structured`.
    """

    converted: tuple[str, ...]
    dense: dict[str, str]

    def __str__(self) -> str:
        reasons = Counter(self.dense.values())
        names_by_reason = {
            reason: [name for name, other in self.dense.items() if other == reason] for reason in reasons
        }
        parts = [f"{reason}: {first_names(names, 3)}" for reason, names in names_by_reason.items()]
        return f"{len(self.converted)} linears are semi-structured, {len(self.dense)} dense ({'; '.join(parts)})"


def why_dense(weight: Tensor) -> str | None:
    """The reason why a weight, (out, in), cannot be semi-structured on a suitable GPU; None: it can."""
    if weight.dtype not in MULTIPLES:
        return f"{str(weight.dtype).removeprefix('torch.')} is not float16 or bfloat16"
    rows, columns = MULTIPLES[weight.dtype]
    if not weight.numel() or weight.shape[0] % rows or weight.shape[1] % columns:
        return f"shape is not a multiple of {rows} × {columns}"
    return None if holds(NofM(2, 4), weight != 0) else "2:4 does not hold"


def check_device(device: torch.device, capability: tuple[int, int] | None) -> None:
    """Refuse a device that has no semi-structured products.

    Args:
        device: where the model is to be.
        capability: of the GPU; None: it is none.

    Raises:
        SettingsError: not CUDA, or an older GPU.
    """
    if device.type != "cuda":
        raise SettingsError(
            f"semi_structured needs CUDA, not {device}",
            f"give device='cuda' where there is one; else {HINT}",
        )
    if capability is None or capability < CAPABILITY:
        present = "unknown" if capability is None else ".".join(map(str, capability))
        older = f"semi_structured needs a GPU of compute capability 8.0 or newer, not {present}"
        raise SettingsError(older, HINT)


def convert(model: nn.Module, convert_weight: Callable[[Tensor], Tensor] | None = None) -> SemiStructured:
    """Convert the linears that allow it, in place; a warning names the linears that stay dense.

    Args:
        model: on its device.
        convert_weight: PyTorch's `to_sparse_semi_structured`; tests have their own.

    Raises:
        ModelError: no linear can be converted.
    """
    convert_weight = convert_weight or torch.sparse.to_sparse_semi_structured
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    converted: list[str] = []
    dense: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        reason = "shared with another module" if uses[id(module.weight)] > 1 else why_dense(module.weight)
        if reason is None:
            try:
                sparse = convert_weight(module.weight.detach().contiguous())
                module.weight = nn.Parameter(sparse, requires_grad=False)
                converted.append(name)
            except (RuntimeError, NotImplementedError) as error:  # a build of PyTorch without it, another GPU
                reason = f"PyTorch refuses it ({str(error).strip().splitlines()[0]})"
        if reason is not None:
            dense[name] = reason
    result = SemiStructured(tuple(converted), dense)
    if not converted:
        raise ModelError(f"no linear can be semi-structured: {result}", f"prune with --pattern 2:4; or {HINT}")
    if dense:
        warnings.warn(str(result), stacklevel=3)
    return result
