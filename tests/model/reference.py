"""The method on a whole model in memory, with plain hooks and autograd: what streaming must equal.

Nothing of the program's model/ package or run is used, only the masking functions, which have oracles of their own.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import Pattern
from llm_barber.masking.rebuild import rebuild_masks
from llm_barber.masking.saliency import wanda, weight_gradient
from tests.conftest import load_model


class _Captured(Exception):
    pass


class OneByOne(nn.ModuleList):
    """Experts as transformers' own loop runs them, with a module for each linear."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused = [fused]  # in a list it is no submodule
        parameters = dict(fused.named_parameters())
        self.gated = "gate_up_proj" in parameters
        for number in range(len(fused.down_proj)):
            expert = nn.Module()
            tensors = {name: parameter[number] for name, parameter in parameters.items()}
            if self.gated and "down_proj_bias" not in tensors:
                tensors["gate_proj"], tensors["up_proj"] = tensors.pop("gate_up_proj").chunk(2)
            for name in [name for name in tensors if not name.endswith("_bias")]:
                weight, bias = tensors[name], tensors.get(f"{name}_bias")
                weight = weight.t() if fused.is_transposed else weight
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
                linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
                if bias is not None:
                    linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
                expert.add_module(name, linear)
            self.append(expert)

    def inner(self, expert: nn.Module, inputs: Tensor) -> Tensor:
        if not self.gated:
            return self.fused[0].act_fn(expert.up_proj(inputs))
        if hasattr(expert, "gate_up_proj"):
            return self.fused[0]._apply_gate(expert.gate_up_proj(inputs))
        return self.fused[0].act_fn(expert.gate_proj(inputs)) * expert.up_proj(inputs)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, place = torch.where(index == number)
            inputs = hidden[token]
            inner = self.inner(expert, inputs)
            result = result.index_add(
                0, token, (expert.down_proj(inner) * weights[token, place, None]).to(hidden.dtype)
            )
        return result


def layer_call(layer: nn.Module, arguments: dict, hidden: Tensor) -> Tensor:
    output = layer(hidden, **arguments)
    return output if isinstance(output, Tensor) else output[0]


def first_call(model: nn.Module, layers: nn.ModuleList, index: int, tokens: Tensor) -> tuple[Tensor, dict]:
    """Hidden states and keyword arguments of a layer's call in an ordinary forward pass."""
    caught = {}

    def hook(_: nn.Module, positional: tuple, keywords: dict) -> None:
        caught["hidden"], caught["arguments"] = positional[0], keywords
        raise _Captured

    handle = layers[index].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return caught["hidden"], caught["arguments"]


def captured(layer: nn.Module, path: str, hidden: Tensor, arguments: dict) -> tuple[Tensor, Tensor]:
    """Input and output of a submodule in a layer's call; inputs of repeated calls are appended as tokens."""
    caught = {}
    module = layer.get_submodule(path)
    tied = (
        [other for other in layer.modules() if other is not module and other._parameters.get("weight") is module.weight]
        if isinstance(module, nn.Linear)
        else []
    )

    def hook(_: nn.Module, positional: tuple, keywords: dict, output: Tensor | tuple) -> None:
        states = positional[0] if positional else keywords["hidden_states"]
        caught["input"] = torch.cat([caught["input"], states], -2) if "input" in caught else states
        caught["output"] = output if isinstance(output, Tensor) else output[0]

    handles = [linear.register_forward_hook(hook, with_kwargs=True) for linear in (module, *tied)]
    layer_call(layer, arguments, hidden)
    for handle in handles:
        handle.remove()
    return caught["input"], caught["output"]


def one_by_one(model: nn.Module) -> nn.Module:
    """A model with a module, weight (out, in), for each linear."""
    for module in list(model.modules()):  # GPT-2 keeps its weights as (in, out)
        for name, child in list(module.named_children()):
            if getattr(child._parameters.get("down_proj"), "ndim", 0) == 3:
                setattr(module, name, OneByOne(child))
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape).requires_grad_(False)
                linear.weight.data, linear.bias.data = child.weight.t().contiguous(), child.bias
                setattr(module, name, linear)
    return model


def prune_in_memory(
    folder: Path,
    layers_path: str,
    blocks_of: Callable[[nn.Module], dict[str, tuple[str, tuple[str, ...]]]],
    tokens: Tensor,
    pattern: Pattern,
    granularity: Granularity,
    ratio: float,
) -> dict[str, Tensor]:
    """Wanda's mask rebuilt, layer by layer; keep masks by parameter name.

    `blocks_of`: of a layer, name → (output module, linears), in order.
    """
    model = one_by_one(load_model(folder, dtype=torch.float32).eval().requires_grad_(False))
    layers = model.get_submodule(layers_path)
    masks = {}
    for index in range(len(layers)):
        # The model before this layer is already sparse, so that an ordinary forward gives the sparse stream.
        calls = [first_call(model, layers, index, sequence[None]) for sequence in tokens]
        layer, dense = layers[index], copy.deepcopy(layers[index])
        blocks = blocks_of(layer)
        names = [name for _, linears in blocks.values() for name in linears]
        squares = {}
        with torch.no_grad():
            for name in names:
                inputs = [captured(layer, name, *c)[0] for c in calls]
                squares[name] = sum(states.float().square().flatten(0, -2).sum(0) for states in inputs) / len(inputs)
        keep = {}
        for name in names:
            weight = layer.get_submodule(name).weight
            keep[name] = initial_mask(wanda(weight.data, squares[name]), pattern, Granularity.OUTPUT)
            weight.data[~keep[name]] = 0
        for output_path, linears in blocks.values():
            total = {name: torch.zeros_like(keep[name], dtype=torch.float32) for name in linears}
            # The dense block behind the sparse (final) earlier blocks of this layer.
            mixed = copy.deepcopy(layer).requires_grad_()
            for name in linears:
                mixed.get_submodule(name).weight.data.copy_(dense.get_submodule(name).weight.data)
            for hidden, arguments in calls:
                with torch.no_grad():
                    _, sparse = captured(layer, output_path, hidden, arguments)
                mixed.zero_grad()
                _, output = captured(mixed, output_path, hidden, arguments)
                nn.functional.mse_loss(output, sparse).backward()
                for name in linears:
                    gradient = mixed.get_submodule(name).weight.grad
                    total[name] += 0 if gradient is None else gradient**2 / len(calls)
            rebuilt = rebuild_masks(
                [keep[name] for name in linears],
                [weight_gradient(dense.get_submodule(name).weight.data, total[name]) for name in linears],
                granularity,
                ratio,
            )
            for name, result in zip(linears, rebuilt, strict=True):
                weight = layer.get_submodule(name).weight
                weight.data.copy_(torch.where(result.keep, dense.get_submodule(name).weight.data, 0))
                masks[f"{layers_path}.{index}.{name}"] = result.keep
    return masks
