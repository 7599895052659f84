"""RMS norms by PyTorch's `rms_norm` on a GPU.

transformers computes an RMS norm in six operations, which read and write 36 bytes of memory for each bfloat16 number.
`rms_norm` is one kernel on a GPU, and reads and writes 4; forms that round where a module rounds take 4 to 20. A module
computes in one of `FORMS` if that gives its bits on the CPU, in float32, bfloat16 and float16. (On a GPU sums may be
ordered otherwise.) Modules are known by what they compute, not by their names.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

from llm_barber.model.same_bits import has_bits_of

# Outputs, (…, features), from hidden states, a weight, (features,), of their dtype, and ε.
Form = Callable[[Tensor, Tensor, float], Tensor]
PROBES = 16  # tokens of each of two sequences that a form is tried on
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _weight_after(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Round to the dtype, and multiply by the weight (LLaMA)."""
    return weight * rms_norm(hidden, weight.shape, None, epsilon)


def _weight_within(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Multiply by the weight before rounding (OLMo 2)."""
    return rms_norm(hidden, weight.shape, weight, epsilon)


def _offset_weight(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Multiply by 1 + weight before rounding (Gemma)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return rms_norm(hidden.to(wide), weight.shape, 1 + weight.to(wide), epsilon).to(hidden.dtype)


FORMS: tuple[Form, ...] = (_weight_after, _weight_within, _offset_weight)


@dataclass(frozen=True)
class RmsNorm:
    """A module, and the form that computes what it does."""

    module: nn.Module
    epsilon: float
    form: Form


def fuse_norms(modules: nn.Module) -> None:
    """Let the RMS norms among some modules compute with PyTorch's `rms_norm`.

    Args:
        modules: their weights may be on `meta`. Hooks on the norms stay.
    """
    for norm in rms_norms(modules):
        norm.module.forward = partial(_forward, norm, norm.module.forward)


def rms_norms(modules: nn.Module) -> Iterator[RmsNorm]:
    """Find the modules that compute an RMS norm in one of `FORMS`; modules that look alike are tried once."""
    known: dict[tuple[Any, ...], Form | None] = {}
    for module in modules.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
        key = (type(module), module.get_parameter("weight").numel(), *sorted(settings.items()))
        if key not in known:
            tried = (RmsNorm(module, epsilon, form) for form in FORMS)
            known[key] = next(
                (norm.form for norm in tried if all(_has_its_bits(norm, dtype) for dtype in DTYPES)), None
            )
        form = known[key]
        if form is not None:
            yield RmsNorm(module, epsilon, form)


def _epsilon(module: nn.Module) -> float | None:
    """The only float of a module that has one weight, (features,), and takes one tensor; None: not such a module."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1 or list(module.buffers()):
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float)]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return numbers[0] if len(numbers) == 1 and numbers[0] > 0 and takes_one else None


def _has_its_bits(norm: RmsNorm, dtype: torch.dtype) -> bool:
    """Try the module and the form on the CPU, with a random weight, and inputs so small that ε counts."""
    features = norm.module.get_parameter("weight").numel()
    with torch.device("cpu"):
        made = torch.Generator().manual_seed(0)
        weight = (torch.rand(features, generator=made) + 0.5).to(dtype)
        hidden = (torch.randn(2, PROBES, features, generator=made) * math.sqrt(norm.epsilon)).to(dtype)
        expected = norm.form(hidden, weight, norm.epsilon)
        output = None
        with suppress(Exception):  # a module that takes no such input is not of this form
            output = functional_call(norm.module, {"weight": weight}, (hidden,))
    return has_bits_of(output, expected)


def _forward(norm: RmsNorm, unfused: Callable[..., Tensor], *arguments: Tensor, **named: Tensor) -> Tensor:
    """Normalise hidden states, (…, features); the module itself does so if its weight has another dtype."""
    weight, (hidden,) = cast(Tensor, norm.module.weight), (*arguments, *named.values())
    if hidden.dtype != weight.dtype:
        return unfused(*arguments, **named)
    return norm.form(hidden, weight, norm.epsilon)
