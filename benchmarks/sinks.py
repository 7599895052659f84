"""Measure attention sinks: the share that one huge token of a window has in what pruning sees.

    python benchmarks/sinks.py [DENSE] [PRUNED] --text FILE [--windows 4]

An attention sink is a token whose states are far larger than those of the other tokens. Windows of text go through
DENSE, and through PRUNED if it is named. It prints two tables, means over the windows:

- by decoder layer: the largest token of the layer's output, and its share of the squared difference between DENSE and
  PRUNED, plain and with huge channels capped as in the distance that tuning lowers (`method/distance.py`, by the
  medians of the window); and false sinks in a window: tokens that are over three times as large in PRUNED as in DENSE;
- by kind of linear in DENSE, for the largest token of the linear's own input: its share of the sums over tokens that
  Wanda, SparseGPT, ALPS, swaps and least squares rank by (‖x‖² by channel, the diagonal of the Gram matrix), the
  largest over all layers.

Layers count from 1. `sink_shares.py` measures the token's share in errors and gradients.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import keep, model_folder, show
from torch import Tensor, nn
from transformers import AutoTokenizer

from llm_barber import load
from llm_barber.method.distance import Distance, usual_squares
from llm_barber.text.windows import windows_of

NORMS = {"its norm / median": ".1f", "its share of squares": ".0%", "largest channel's share": ".0%"}
DIFFERENCES = {
    "of the difference": ".0%",
    "… channels capped": ".0%",
    "its relative error": ".1%",
    "median token's": ".1%",
    "false sinks": ".1f",
}
FALSE_SINK = 3  # times a token's norm in the dense model
INPUTS = ["inputs of", "largest token's share of ‖X‖²", "in layer", "channels where it has over half", "in layer"]


def window_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the windows of text; dense and pruned model are to be added."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=1, help="windows, the first of the text (default: 1)")
    return parser


def read_windows(model: str, text: Path, count: int, length: int) -> Tensor:
    """The first windows of a text, int64 (windows, tokens), each with the token that begins the model's texts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows, tokens = windows_of(text.read_text(encoding="utf-8"), tokenizer, length, bos=True)
    if len(windows) < count:
        sys.exit(f"{text} has {tokens} tokens, too few for {count} windows of {length}: give a longer text")
    return windows[:count]


def watch_inputs(model: nn.Module) -> dict[str, dict[int, list[Tensor]]]:
    """Let each run of one window add its shares of inputs to the result.

    Returns:
        By kind of linear and layer (from 0), for each window: the largest token's share of the inputs' squares, and the
        share of channels where it has over half of them, (2,).
    """
    shares: dict[str, dict[int, list[Tensor]]] = {}

    def look(kind: str, layer: int, _: Any, arguments: tuple[Tensor, ...]) -> None:
        squares = arguments[0].reshape(-1, arguments[0].shape[-1]).float().square()
        largest = squares[squares.sum(1).argmax()]
        sums = squares.sum(0)
        of_window = torch.stack([largest.sum() / sums.sum(), (largest > 0.5 * sums).float().mean()])
        shares.setdefault(kind, {}).setdefault(layer, []).append(of_window)

    for name, module in model.named_modules():
        _, in_layers, path = name.rpartition(".layers.")
        if isinstance(module, nn.Linear) and in_layers:
            layer, _, kind = path.partition(".")
            module.register_forward_pre_hook(partial(look, kind, int(layer)))
    return shares


@torch.no_grad()
def run_windows(model: nn.Module, windows: Tensor) -> Tensor:
    """States after each decoder layer but the last, float32 (windows, layers, tokens, hidden)."""
    states = []
    for window in windows:
        outputs = model(input_ids=window[None], output_hidden_states=True, use_cache=False)
        # The last state of transformers comes after the last norm; the others are what a layer gives the next one.
        states.append(torch.stack([state[0].float() for state in outputs.hidden_states[1:-1]]))
    return torch.stack(states)


def norms(state: Tensor) -> list[Tensor]:
    """The columns `NORMS` of a layer's output, (tokens, hidden)."""
    squares = state.square()
    of_tokens, of_channels = squares.sum(1), squares.sum(0)
    ratio = (of_tokens.max() / of_tokens.median()).sqrt()
    return [ratio, of_tokens.max() / of_tokens.sum(), of_channels.max() / of_channels.sum()]


def differences(dense: Tensor, pruned: Tensor) -> list[Tensor]:
    """The columns `DIFFERENCES` of a layer's outputs, (tokens, hidden)."""
    squares = (pruned - dense).square()
    of_tokens, norm = squares.sum(1), dense.square().sum(1)
    largest = int(norm.argmax())
    capped = Distance.of(usual_squares(dense[None])).differences(dense[None], pruned[None]).by_token[0]
    shares = [tokens[largest] / tokens.sum() for tokens in (of_tokens, capped)]
    relative = of_tokens / norm
    false_sinks = (pruned.square().sum(1) > FALSE_SINK**2 * norm).sum().float()
    return [*shares, relative[largest], relative.median(), false_sinks]


def layer_rows(before: Tensor, after: Tensor | None, formats: list[str]) -> list[list[str]]:
    """A row for each decoder layer: largest tokens of the windows, and means over windows."""
    rows = []
    for layer in range(before.shape[1]):
        tokens = [int(state[layer].square().sum(1).argmax()) for state in before]
        means = torch.tensor(
            [
                [*norms(dense[layer]), *(differences(dense[layer], after[window][layer]) if after is not None else [])]
                for window, dense in enumerate(before)
            ]
        ).mean(0)
        numbers = [format(mean, style) for mean, style in zip(means.tolist(), formats, strict=True)]
        rows.append([str(layer + 1), listed(tokens), *numbers])
    return rows


def listed(tokens: Iterable[int]) -> str:
    """Positions of tokens, each once. Example: [5, 0, 0] -> "0, 5"."""
    return ", ".join(map(str, sorted(set(tokens))))


def input_rows(shares: dict[str, dict[int, list[Tensor]]]) -> list[list[str]]:
    """For each kind of linear the largest shares, means over windows, and the layers that have them, from 1."""
    rows = []
    for kind, layers in shares.items():
        means = {layer: torch.stack(of_windows).mean(0).tolist() for layer, of_windows in layers.items()}
        row = [kind]
        for number in range(2):
            layer = max(means, key=lambda layer: means[layer][number])
            row += [f"{means[layer][number]:.1%}", str(layer + 1)]
        rows.append(row)
    return rows


def main() -> None:
    """Print both tables."""
    parser = window_parser(__doc__)
    parser.add_argument("dense", nargs="?", help="a checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("pruned", nargs="?", help="the same model, pruned")
    options = parser.parse_args()
    dense, pruned = model_folder(options.dense), options.pruned and model_folder(options.pruned)
    windows = read_windows(dense, options.text, options.windows, options.tokens)
    model = load(dense, dtype=torch.bfloat16)
    shares = watch_inputs(model)
    before = run_windows(model, windows)
    del model  # its memory is for the pruned one
    after = run_windows(load(pruned, dtype=torch.bfloat16), windows) if pruned else None
    columns = NORMS | (DIFFERENCES if pruned else {})
    rows = layer_rows(before, after, list(columns.values()))
    models = " and ".join(Path(folder).name for folder in (dense, pruned) if folder)
    title = f"{models}: {len(windows)} × {options.tokens} tokens"
    tables = ((["after layer", "largest token", *columns], rows), (INPUTS, input_rows(shares)))
    for headings, table in tables:
        keep("sinks", {"title": title, "headings": headings, "rows": table})
        show(title, headings, table)


if __name__ == "__main__":
    main()
