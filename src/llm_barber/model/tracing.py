"""Run a decoder layer once, with zeros for weights, to see which modules it calls, and in which order."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.stepping import TRIAL_TOKENS


@dataclass
class LayerRun:
    """Modules of a layer in the order of their first calls, and their outputs.

    Attributes:
        order: module → index of its first call.
        states: module → states that it returned last, in the graph.
        outputs: linear → its output, in the graph.
        routers: linears that only choose experts or tokens: the layer's output does not depend on them.
    """

    order: dict[str, int] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)

    def width(self, name: str) -> int | None:
        """Last dimension of the states that a module returned; None: it returned no states."""
        return self.states[name].shape[-1] if name in self.states else None

    def without_effect(self, linears: Sequence[str], states: Tensor | None) -> list[str]:
        """Linears that were called, and on whose outputs the states do not depend."""
        called = [name for name in linears if name in self.outputs]
        if not called or states is None or not states.requires_grad:
            return called
        outputs = [self.outputs[name] for name in called]
        gradients = torch.autograd.grad(states.sum(), outputs, allow_unused=True, retain_graph=True)
        return [name for name, gradient in zip(called, gradients, strict=True) if gradient is None]


def first_of_each_kind(layers: nn.ModuleList) -> list[int]:
    """Index of the first layer of each kind; layers of a kind have the same modules."""
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault(tuple((name, type(module)) for name, module in layer.named_modules()), index)
    return list(first.values())


def run_layer(skeleton: Skeleton, index: int, hidden: Tensor) -> LayerRun:
    """Run a layer with zeros for weights; experts return their inputs.

    Args:
        skeleton: a model that has embedded one sequence of `TRIAL_TOKENS` tokens.
        index: the layer's number.
        hidden: the layer's input, (1, TRIAL_TOKENS, hidden).

    Raises:
        ModelError: the layer hands on more than the states.
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
                setattr(module, "forward", _skipped)  # noqa: B010 - of the instance
                stack.callback(delattr, module, "forward")
            before = module.register_forward_pre_hook(_noting_call(run, name))
            after = module.register_forward_hook(_noting_states(run, name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        output = layer(hidden, **skeleton.arguments(index, 1, TRIAL_TOKENS))
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
    """Test for a linear, of PyTorch or of transformers (`Conv1D`)."""
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
        return run.outputs[name].clone()  # the layer may write to it

    return hook


def _skipped(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
