"""The method of LLM-Barber (arXiv 2408.10631) in one file: Wanda's mask, rebuilt block by block, the model in memory.

    python examples/barber.py MODEL TEXT OUT

MODEL is a LLaMA-shaped checkpoint (LLaMA, Mistral, Qwen, SmolLM), TEXT a .txt file. `llm-barber prune --preset paper`
finds the same masks; it reads one layer at a time, resumes, and knows other families and methods.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}  # fmt: skip
Arguments = dict[str, Any]  # of a decoder layer's call, beside its input


def prune(model: nn.Module, windows: Tensor, sparsity: float = 0.5, ratio: float = 0.01) -> dict[str, Tensor]:
    """Prune a float32 model in place on token ids, (windows, tokens); kept weights stay as they are.

    Returns keep masks, bool, (out, in), by the name of the linear. `ratio`: share of the beneficial pairs to swap.
    """
    model.requires_grad_(False)
    inputs, arguments = first_inputs(model, windows)
    masks = {}
    for index, layer in enumerate(model.model.layers):
        dense = copy.deepcopy(layer)
        layer_masks = wanda_masks(layer, inputs, arguments, sparsity)
        apply_masks(layer, dense, layer_masks)
        for block, names in BLOCKS.items():  # attention is final before the MLP is looked at
            paths = [f"{block}.{name}" for name in names]
            squares = gradient_squares(layer, dense, block, paths, inputs, arguments)
            for path in paths:
                saliency = dense.get_submodule(path).weight.abs() * squares[path].sqrt()  # weight times gradient
                layer_masks[path] = rebuilt(layer_masks[path], saliency, ratio)
            apply_masks(layer, dense, layer_masks)
            inputs = [hidden + block_output(layer, block, hidden, arguments) for hidden in inputs]
        masks |= {f"model.layers.{index}.{path}": mask for path, mask in layer_masks.items()}
    return masks


def first_inputs(model: nn.Module, windows: Tensor) -> tuple[list[Tensor], Arguments]:
    """The first layer's input for each window, (1, tokens, hidden), and the other arguments of its call."""
    inputs, arguments = [], {}

    def hook(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        inputs.append(positional[0])
        arguments.update(keywords)

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return inputs, arguments


def wanda_masks(layer: nn.Module, inputs: list[Tensor], arguments: Arguments, sparsity: float) -> dict[str, Tensor]:
    """Wanda: the lowest |W| · ‖X‖ of each row go, X being the linear's inputs in the layer that is not pruned yet."""
    squares: dict[nn.Module, Tensor] = {}
    linears = {f"{block}.{name}": layer.get_submodule(f"{block}.{name}") for block in BLOCKS for name in BLOCKS[block]}

    def hook(linear: nn.Module, positional: tuple[Tensor, ...]) -> None:
        squares[linear] = squares.get(linear, 0) + positional[0].square().sum((0, 1))

    handles = [linear.register_forward_pre_hook(hook) for linear in linears.values()]
    for hidden in inputs:
        layer(hidden, **arguments)
    for handle in handles:
        handle.remove()
    masks: dict[str, Tensor] = {}
    for path, linear in linears.items():
        score = linear.weight.abs() * squares[linear].sqrt()
        lowest = score.sort(dim=1, stable=True).indices[:, : int(sparsity * score.shape[1])]
        masks[path] = torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)
    return masks


def gradient_squares(
    layer: nn.Module, dense: nn.Module, block: str, paths: list[str], inputs: list[Tensor], arguments: Arguments
) -> dict[str, Tensor]:
    """Mean over windows of the squared gradient of mean((y_dense − y_sparse)²) at the dense weights, by linear."""
    weights = [dense.get_submodule(path).weight.requires_grad_() for path in paths]
    squares = {path: torch.zeros_like(weight) for path, weight in zip(paths, weights, strict=True)}
    for hidden in inputs:
        y_sparse = block_output(layer, block, hidden, arguments)
        loss = nn.functional.mse_loss(block_output(dense, block, hidden, arguments), y_sparse)
        for path, gradient in zip(paths, torch.autograd.grad(loss, weights), strict=True):
            squares[path] += gradient.square() / len(inputs)
    dense.requires_grad_(False)
    return squares


def block_output(layer: nn.Module, block: str, hidden: Tensor, arguments: Arguments) -> Tensor:
    """A block's output, before it is added to `hidden`."""
    if block == "mlp":
        return layer.mlp(layer.post_attention_layernorm(hidden))
    return layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[0]


def rebuilt(mask: Tensor, saliency: Tensor, ratio: float) -> Tensor:
    """Row by row, swap pruned weights of high saliency with kept weights of low saliency.

    Example: saliency [1, 2, 3, 4], kept [1, 1, 0, 0] and ratio 0.5: pairs (4, 1) and (3, 2) are beneficial, one is
    swapped, so that [0, 1, 0, 1] is kept.
    """
    result = mask.clone()
    for row, score in enumerate(saliency):
        pruned, kept = (~mask[row]).nonzero().flatten(), mask[row].nonzero().flatten()
        grow = pruned[score[pruned].sort(descending=True, stable=True).indices]
        drop = kept[score[kept].sort(stable=True).indices]
        pairs = min(len(grow), len(drop))
        beneficial = int((score[grow[:pairs]] > score[drop[:pairs]]).sum())
        swaps = int(ratio * beneficial)
        result[row, grow[:swaps]], result[row, drop[:swaps]] = True, False
    return result


def apply_masks(layer: nn.Module, dense: nn.Module, masks: dict[str, Tensor]) -> None:
    """Give the linears the dense weights, with zeros where the masks prune."""
    for path, mask in masks.items():
        layer.get_submodule(path).weight.copy_(dense.get_submodule(path).weight.masked_fill(~mask, 0))


def main() -> None:
    """Prune from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    masks = prune(model, tokens[: options.windows * 512].view(-1, 512), options.sparsity)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {len(masks)} linears pruned")


if __name__ == "__main__":
    main()
