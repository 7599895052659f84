"""An activation of gates times ups, of MLPs and of experts, in one operation (`gpu/steps.py`).

An MLP is known by what it computes: down(activation(gate(x)) · up(x)), with SiLU or GELU, whatever its linears are
called, with gate and up in one linear or in two. One that gives other bits for random numbers on the CPU, in any of
three dtypes, stays.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_barber.gpu.kernels import ACTIVATIONS, DTYPES
from llm_barber.gpu.steps import gate
from llm_barber.model.experts import GATE, GATE_UP, UP, Experts, Linear
from llm_barber.model.same_bits import has_bits_of

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes: parameters, hooks, …
Combine = Callable[[Linear, Tensor], Tensor]  # as `Experts.combine`
TOKENS, HIDDEN, INNER = 5, 6, 10  # of what a module is tried on
# Sizes of its numbers: limits of activations show where they are large. Products of such exceed the largest float16.
SIZES = {torch.float16: (1.0,), torch.bfloat16: (1.0, 1e3), torch.float32: (1.0, 1e3)}


@dataclass(frozen=True)
class Roles:
    """Which children of an MLP are what; `up` is None if `gate` is the linear of both.

    `activation`: of `kernels.ACTIVATIONS`. `gate_first`: of the outputs of one linear for both, the first half are the
    gate's.
    """

    gate: str
    up: str | None
    down: str
    activation: str = "silu"
    gate_first: bool = True

    def compute(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Output of the MLP, of the shape of its input."""
        linear: Callable[[str], Any] = module.get_submodule
        if self.up is None:
            halves = linear(self.gate)(hidden).chunk(2, -1)
            gates, ups = halves if self.gate_first else halves[::-1]
        else:
            gates, ups = linear(self.gate)(hidden), linear(self.up)(hidden)
        return cast(Tensor, linear(self.down)(gate(gates, ups, self.activation)))


def fuse_gates(modules: nn.Module) -> None:
    """Let the MLPs and experts among some modules multiply activated gates in one operation.

    Args:
        modules: their weights may be on `meta`. Hooks on them and on their linears stay.
    """
    for module, roles in gated_mlps(modules):
        module.forward = partial(_forward, module, roles)
    for module in modules.modules():
        if isinstance(module, Experts) and (combine := _one_operation(module)) is not None:
            module.__dict__["combine"] = combine


def gated_mlps(modules: nn.Module) -> Iterator[tuple[nn.Module, Roles]]:
    """Find the MLPs whose forward is activated gates times ups, between linears; modules alike are tried once."""
    known: dict[tuple[Any, ...], Roles | None] = {}
    for module in modules.modules():
        linears = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        if not _may_be_gated(module, linears):
            continue
        key = (type(module), *((name, linear.bias is None) for name, linear in linears.items()), *_settings(module))
        if key not in known:
            tried = (roles for roles in _possible_roles(list(linears)) if _has_its_bits(module, roles, linears))
            known[key] = next(tried, None)
        roles = known[key]
        if roles is not None:
            yield module, roles


def _may_be_gated(module: nn.Module, linears: dict[str, nn.Linear]) -> bool:
    """Test for a module of two or three linears, without other parameters or buffers, that takes one tensor."""
    if len(linears) not in (2, 3) or any(True for _ in module.buffers()):
        return False
    linears_have = sum(1 for linear in linears.values() for _ in linear.parameters())
    has_no_others = sum(1 for _ in module.parameters()) == linears_have
    return has_no_others and len(inspect.signature(module.forward).parameters) == 1


def _settings(module: nn.Module) -> list[object]:
    """List what a module may compute by, of its own and of its children that are no linears.

    Numbers and texts are compared by value, all else by identity.
    """
    return [
        (type(child), name, value if isinstance(value, (int, float, str)) else id(value))
        for child in module.modules()
        if not isinstance(child, nn.Linear)
        for name, value in vars(child).items()
        if name not in OF_EVERY_MODULE
    ]


def _possible_roles(names: list[str]) -> Iterator[Roles]:
    for activation, order in product(ACTIVATIONS, permutations(names)):
        if len(order) == 2:
            yield from (Roles(order[0], None, order[1], activation, first) for first in (True, False))
        else:
            gate_name, up_name, down_name = order
            yield Roles(gate_name, up_name, down_name, activation)


def _has_its_bits(module: nn.Module, roles: Roles, linears: dict[str, nn.Linear]) -> bool:
    """Try the module's forward and `Roles.compute` on the CPU, with small random linears in place of the module's."""
    return all(_has_its_bits_in(dtype, module, roles, linears) for dtype in DTYPES)


def _has_its_bits_in(dtype: torch.dtype, module: nn.Module, roles: Roles, linears: dict[str, nn.Linear]) -> bool:
    shapes = {roles.gate: (HIDDEN, INNER * (2 if roles.up is None else 1)), roles.down: (INNER, HIDDEN)}
    if roles.up is not None:
        shapes[roles.up] = (HIDDEN, INNER)
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        made = torch.Generator().manual_seed(0)
        small = copy.copy(module)
        small.__dict__["_modules"] = dict(module.named_children())
        for name, linear in linears.items():
            small._modules[name] = nn.Linear(*shapes[name], bias=linear.bias is not None, dtype=dtype)
            for parameter in small.get_submodule(name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=made))
        for size in SIZES[dtype]:
            hidden, output = (size * torch.randn(2, TOKENS, HIDDEN, generator=made)).to(dtype), None
            with suppress(Exception):  # a module that takes no such linears is not of this form
                output = small.forward(hidden)
            if not has_bits_of(output, roles.compute(small, hidden)):
                return False
    return True


def _forward(module: nn.Module, roles: Roles, *arguments: Tensor, **named: Tensor) -> Tensor:
    (hidden,) = (*arguments, *named.values())
    return roles.compute(module, hidden)


def _one_operation(experts: Experts) -> Combine | None:
    """Find what combines gate and up in one operation, with the experts' bits on the CPU for random outputs of both."""
    if experts.first_linear != GATE_UP:
        return None
    tried = [(dtype, size) for dtype in DTYPES for size in SIZES[dtype]]
    for activation in ACTIVATIONS:
        combine = partial(_combine_separate if experts.separate else _combine_joined, activation)
        if all(_combines_like(combine, experts, *of_values) for of_values in tried):
            return combine
    return None


def _combines_like(combine: Combine, experts: Experts, dtype: torch.dtype, size: float) -> bool:
    with torch.device("cpu"):
        made = torch.Generator().manual_seed(0)
        # As halves of rows, since a CPU computes activations otherwise where rows are contiguous.
        joined = (3 * size * torch.randn(TOKENS, 2 * INNER, generator=made)).to(dtype)
        outputs = dict(zip((GATE, UP), joined.chunk(2, -1), strict=True)) | {GATE_UP: joined}
        output = None
        with suppress(Exception):  # experts that need more than these outputs are not of this form
            output = experts.combine(lambda name, _: outputs[name], outputs[GATE])
        return has_bits_of(output, combine(lambda name, _: outputs[name], outputs[GATE]))


def _combine_separate(activation: str, linear: Linear, inputs: Tensor) -> Tensor:
    return gate(linear(GATE, inputs), linear(UP, inputs), activation)


def _combine_joined(activation: str, linear: Linear, inputs: Tensor) -> Tensor:
    gates, ups = linear(GATE_UP, inputs).chunk(2, -1)
    return gate(gates, ups, activation)
