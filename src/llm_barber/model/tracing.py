"""One decoder layer, run once with zeros for weights: which of its modules are called, in which order, and for what."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.stepping import TOKENS


@dataclass
class LayerRun:
    """Modules of a layer in the order in which they were first called, and what they returned."""

    order: dict[str, int] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)  # what each returned last, with its graph
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of linears, as they were returned
    # Linears that say no more than which experts or tokens there are to be: the layer's output does not depend on them.
    routers: set[str] = field(default_factory=set)

    def width(self, name: str) -> int | None:
        """The last dimension of what a module returned; None: it returned no states."""
        return self.states[name].shape[-1] if name in self.states else None

    def without_effect(self, linears: Sequence[str], states: Tensor | None) -> list[str]:
        """Those of the linears that were called whose outputs these states do not depend on."""
        called = [name for name in linears if name in self.outputs]
        if not called or states is None or not states.requires_grad:
            return called
        outputs = [self.outputs[name] for name in called]
        gradients = torch.autograd.grad(states.sum(), outputs, allow_unused=True, retain_graph=True)
        return [name for name, one in zip(called, gradients, strict=True) if one is None]


def first_of_each_kind(layers: nn.ModuleList) -> list[int]:
    """The first layer of each kind: those that have the same modules are alike."""
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault(tuple((name, type(module)) for name, module in layer.named_modules()), index)
    return list(first.values())


def run_layer(skeleton: Skeleton, index: int, hidden: Tensor) -> LayerRun:
    """Run a layer; experts hand on what they are given.

    Args:
        skeleton: which has embedded one sequence of `TOKENS` tokens.
        index: of the layer.
        hidden: what it is given, (1, TOKENS, hidden).

    Raises:
        ModelError: it hands on more than the states.
    """
    names = skeleton.layer_names(index)
    layer = skeleton.load_layer(index, {name: zeros_of(skeleton.layers[index], name) for name in names})
    run = LayerRun()
    with ExitStack() as stack, torch.enable_grad():
        for name, module in layer.named_modules():
            if is_linear(module):
                marking = module.register_forward_hook(_marking_output(run, name))
                stack.callback(marking.remove)
            if isinstance(module, Experts):
                setattr(module, "forward", _skipped)  # noqa: B010 - an instance's
                stack.callback(delattr, module, "forward")
            before = module.register_forward_pre_hook(_noting_call(run, name))
            after = module.register_forward_hook(_noting_states(run, name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        output = layer(hidden, **skeleton.arguments(index, 1, TOKENS))
        states = output if isinstance(output, Tensor) else output[0]
        run.routers = set(run.without_effect(list(run.outputs), states))
    skeleton.release_layer(index)
    assert skeleton.stepping is not None
    skeleton.stepping.check(skeleton.model, output)
    return run


def zeros_of(module: nn.Module, name: str) -> Tensor:
    """Zeros of a parameter's shape that take no memory."""
    return torch.zeros(()).expand(module.get_parameter(name).shape)


def is_linear(module: nn.Module) -> bool:
    """Is it a linear, of either kind?"""
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.dim() == 2


def _noting_call(run: LayerRun, name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        run.order.setdefault(name, len(run.order))

    return hook


def _noting_states(run: LayerRun, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.dim() >= 2:
            run.states[name] = first

    return hook


def _marking_output(run: LayerRun, name: str) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        run.outputs[name] = output if output.requires_grad else output.requires_grad_()
        return run.outputs[name].clone()  # which may be written to

    return hook


def _skipped(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
