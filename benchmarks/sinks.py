"""Measure attention sinks: the share that one huge token of a window has in what pruning sees.

    python benchmarks/sinks.py [DENSE] [PRUNED] --text FILE

An attention sink is a token whose states are far larger than those of the other tokens. A window of text goes through
DENSE, and through PRUNED if it is named. It prints two tables:

- by decoder layer: the largest token of the layer's output, and its share of the squared difference between DENSE and
  PRUNED, plain and with huge channels capped as in the distance that tuning lowers (`method/distance.py`); and the
  number of false sinks: tokens that are over three times as large in PRUNED as in DENSE;
- by kind of linear: the largest token's share of the sums over tokens that Wanda, SparseGPT, ALPS, swaps and least
  squares rank by (‖x‖² by channel, the diagonal of the Gram matrix), the largest over all layers.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import keep, model_folder, show
from torch import Tensor
from transformers import AutoTokenizer

from llm_barber import load
from llm_barber.method.distance import Distance, usual_squares
from llm_barber.text.windows import windows_of

NORMS = ["after layer", "largest token", "its norm / median", "its share of squares", "largest channel's share"]
DIFFERENCES = ["of the difference", "… channels capped", "its relative error", "median token's", "false sinks"]
FALSE_SINK = 3  # times a token's norm in the dense model
INPUTS = ["inputs of", "largest token's share of ‖X‖²", "in layer", "channels where it has over half", "in layer"]


@dataclass(frozen=True)
class InputShares:
    """The largest token's share in a linear's inputs: of the squares, and of channels where it has over half."""

    layer: int
    squares: float
    channels: float


@torch.no_grad()
def run_window(model: str, tokens: Tensor) -> tuple[list[Tensor], dict[str, list[InputShares]]]:
    """States after each decoder layer, float32, (tokens, hidden); shares in inputs, by kind of linear."""
    loaded = load(model, dtype=torch.bfloat16)
    shares: dict[str, list[InputShares]] = {}

    def look(name: str, _: Any, arguments: tuple[Tensor, ...]) -> None:
        squares = arguments[0].reshape(-1, arguments[0].shape[-1]).float().square()
        largest = squares[squares.sum(1).argmax()]
        sums = squares.sum(0)
        *_, layer, rest = name.split(".", 3)
        ruled = (largest > 0.5 * sums).float().mean().item()
        shares.setdefault(rest, []).append(InputShares(int(layer), (largest.sum() / sums.sum()).item(), ruled))

    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(partial(look, name))
    outputs = loaded(input_ids=tokens, output_hidden_states=True, use_cache=False)
    # The last state of transformers comes after the last norm; the other states are what a layer gives the next one.
    return [state[0].float() for state in outputs.hidden_states[1:-1]], shares


def norms(state: Tensor) -> list[str]:
    """The largest token of a layer's output, and the largest channel's share of all squares."""
    squares = state.square()
    of_tokens, of_channels = squares.sum(1), squares.sum(0)
    largest = int(of_tokens.argmax())
    ratio = (of_tokens[largest] / of_tokens.median()).sqrt()
    return [
        str(largest),
        f"{ratio:.1f}",
        f"{of_tokens[largest] / of_tokens.sum():.0%}",
        f"{of_channels.max() / of_channels.sum():.0%}",
    ]


def differences(dense: Tensor, pruned: Tensor) -> list[str]:
    """The largest token's share of the squared difference, plain and capped; relative errors; false sinks."""
    squares = (pruned - dense).square()
    of_tokens, norm = squares.sum(1), dense.square().sum(1)
    largest = int(norm.argmax())
    capped = Distance.of(usual_squares(dense[None])).differences(dense[None], pruned[None]).by_token[0]
    shares = [tokens[largest] / tokens.sum() for tokens in (of_tokens, capped)]
    relative = of_tokens / norm
    false_sinks = (pruned.square().sum(1) > FALSE_SINK**2 * norm).sum().item()
    errors = [f"{relative[largest]:.1%}", f"{relative.median():.1%}"]
    return [*(f"{share:.0%}" for share in shares), *errors, str(false_sinks)]


def input_rows(shares: dict[str, list[InputShares]]) -> list[list[str]]:
    """For each kind of linear the largest shares, and the layers that have them."""
    rows = []
    for kind, layers in shares.items():
        squares, channels = max(layers, key=lambda of: of.squares), max(layers, key=lambda of: of.channels)
        rows.append(
            [kind, f"{squares.squares:.1%}", str(squares.layer), f"{channels.channels:.1%}", str(channels.layer)]
        )
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="a checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("pruned", nargs="?", help="the same model, pruned")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the window (default: 512)")
    options = parser.parse_args()
    dense = model_folder(options.dense)
    text, tokenizer = options.text.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(dense)
    windows, _ = windows_of(text, tokenizer, options.tokens, bos=True)
    before, shares = run_window(dense, windows[:1])
    after = run_window(options.pruned, windows[:1])[0] if options.pruned else []
    rows = [
        [str(layer), *norms(state), *(differences(state, after[layer - 1]) if after else [])]
        for layer, state in enumerate(before, 1)
    ]
    pruned = f" and {Path(options.pruned).name}" if options.pruned else ""
    title = f"{Path(dense).name}{pruned}: {options.tokens} tokens"
    for headings, table in (([*NORMS, *(DIFFERENCES if after else [])], rows), (INPUTS, input_rows(shares))):
        keep("sinks", {"title": title, "headings": headings, "rows": table})
        show(title, headings, table)


if __name__ == "__main__":
    main()
