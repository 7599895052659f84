"""Measure attention sinks: the share of one huge token in the errors and gradients that pruning goes by.

    python benchmarks/sink_shares.py DENSE PRUNED --text FILE [--windows 4]

An attention sink is a token whose states are far larger than those of the other tokens. Windows of text go through
PRUNED. It prints a table by decoder layer, for attention (A) and MLP (M), means over the windows. *The largest token*
of a layer is the one with the largest output of the dense model.

- Its share of the error: the squared difference between the block's output with dense and with pruned weights, on the
  same inputs. This is the loss of the published rebuild (arXiv 2408.10631), and what a block has to win by swaps and
  least squares to keep them.
- Its share of that loss's gradients by the dense weights: ‖the token's own gradient‖² ÷ ‖the gradient of the window‖²,
  over all linears of the block. It may exceed 100 %: gradients of other tokens can cancel its own.
- Its share of the sums by which the presets spread sparsity, Σ ‖g‖² ‖x‖² (g: gradient of the model's loss by a
  linear's output, x: the linear's input), in the dense model; the largest over the block's linears.

Layers count from 1. It knows models whose layers are `model.layers` with linears in `self_attn` and `mlp`, such as
LLaMA, Mistral, Qwen2 and Gemma 3.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import keep, model_folder, show
from sinks import listed, read_windows, window_parser
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber import load

BLOCKS = {"self_attn": "A", "mlp": "M"}
HEADINGS = ["after layer", "largest token"]
HEADINGS += [f"of {what}, {block}" for what in ("error", "gradients", "Fisher sums") for block in BLOCKS.values()]


class LinearCalls:
    """Inputs x, (tokens, in), and outputs, (1, tokens, out), of a module's linears in one run."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        self.handles = [child.register_forward_hook(partial(self.look, name)) for name, child in linears]

    def look(self, name: str, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[name], self.outputs[name] = arguments[0].detach()[0].float(), output

    def products(self, loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By linear x, and the gradient g of the loss by its output, float32, (tokens, out); removes the hooks."""
        for handle in self.handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, list(self.outputs.values()))
        return {name: (self.inputs[name], g[0].float()) for name, g in zip(self.outputs, gradients, strict=True)}


def largest_tokens(model: nn.Module, tokens: Tensor) -> list[int]:
    """The largest token of each decoder layer's output; `tokens`: one window, (1, tokens)."""
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    # The last state of transformers comes after the last norm: the last layer has no row.
    return [int(state[0].float().square().sum(1).argmax()) for state in states[1:-1]]


def fisher_shares(model: PreTrainedModel, tokens: Tensor, largest: list[int]) -> list[list[float]]:
    """Shares of the Fisher sums in one window: by layer, for each block the largest over its linears."""
    calls = LinearCalls(model.get_submodule("model.layers"))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
    shares: dict[tuple[int, str], float] = {}
    for name, (x, g) in calls.products(loss).items():
        layer, block, _ = name.split(".", 2)
        if int(layer) < len(largest):
            sums = x.square().sum(1) * g.square().sum(1)
            of_token = share(sums[largest[int(layer)]].item(), sums.sum().item())
            shares[int(layer), block] = max(of_token, shares.get((int(layer), block), 0.0))
    return [[shares[layer, block] for block in BLOCKS] for layer in range(len(largest))]


def block_shares(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor, largest: list[int]
) -> tuple[list[list[float]], list[list[float]]]:
    """Shares of the error, and of its gradients, in one window: by layer, for each block."""
    errors, gradients = ([[0.0] * len(BLOCKS) for _ in largest] for _ in range(2))

    def compare(
        layer: int, number: int, module: nn.Module, _: nn.Module, arguments: Any, named: dict[str, Any], output: Any
    ) -> None:
        token, calls = largest[layer], LinearCalls(module)
        with torch.enable_grad():
            named = {name: with_gradient(value) for name, value in named.items()}
            dense_output = states_of(module(*map(with_gradient, arguments), **named))
            squares = (dense_output[0].float() - states_of(output)[0].float()).square()
            products = calls.products(squares.mean()).values()
        own = sum((g[token].square().sum() * x[token].square().sum()).item() for x, g in products)
        gradients[layer][number] = share(own, sum((g.T @ x).square().sum().item() for x, g in products))
        of_tokens = squares.detach().sum(1)
        errors[layer][number] = share(of_tokens[token].item(), of_tokens.sum().item())

    handles = []
    for layer in range(len(largest)):
        for number, block in enumerate(BLOCKS):
            path = f"model.layers.{layer}.{block}"
            hook = partial(compare, layer, number, dense.get_submodule(path))
            handles.append(pruned.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        pruned(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return errors, gradients


def share(part: float, whole: float) -> float:
    """Share of a part; 0 where the whole is 0, as in blocks that are not pruned."""
    return part / whole if whole else 0.0


def states_of(output: Any) -> Tensor:
    """The states in what a block returns: attention returns its weights beside them."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_gradient(value: Any) -> Any:
    """States, (1, tokens, hidden), whose gradient is taken; anything else as it is."""
    states = isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
    return value.detach().requires_grad_() if states else value


def main() -> None:
    """Print the table."""
    parser = window_parser(__doc__)
    parser.add_argument("dense", help="a checkpoint")
    parser.add_argument("pruned", help="the same model, pruned")
    options = parser.parse_args()
    folder, pruned_folder = model_folder(options.dense), model_folder(options.pruned)
    windows = read_windows(folder, options.text, options.windows, options.tokens)
    dense, pruned = (load(name, dtype=torch.bfloat16).requires_grad_(False) for name in (folder, pruned_folder))
    try:
        for block in BLOCKS:
            dense.get_submodule(f"model.layers.0.{block}")
    except AttributeError as error:
        parser.error(f"{folder} is built in another way: {error}")
    shares, tokens_of_layers = [], []
    for window in windows:
        largest = largest_tokens(dense, window[None])
        tokens_of_layers.append(largest)
        errors, gradients = block_shares(dense, pruned, window[None], largest)
        fisher = fisher_shares(dense, window[None], largest)
        shares.append(torch.cat([torch.tensor(of) for of in (errors, gradients, fisher)], dim=1))
    rows = [
        [str(layer), listed(tokens), *(f"{mean:.1%}" for mean in means)]
        for layer, (means, *tokens) in enumerate(
            zip(torch.stack(shares).mean(0).tolist(), *tokens_of_layers, strict=True), 1
        )
    ]
    title = f"{Path(folder).name} and {Path(pruned_folder).name}: {len(windows)} × {options.tokens} tokens"
    keep("sink-shares", {"title": title, "headings": HEADINGS, "rows": rows})
    show(title, HEADINGS, rows)


if __name__ == "__main__":
    main()
