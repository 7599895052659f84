"""Sinks: tokens whose states are far larger than the others', and their share of what pruning changes, by layer.

    python benchmarks/sinks.py DENSE [PRUNED] --text FILE

One window of text goes through DENSE, and through PRUNED if it is given. Channels are capped as in the distance that
tuning lowers (`distance.py`).
"""

import argparse
from pathlib import Path

import torch
from common import keep, model_folder, show
from torch import Tensor
from transformers import AutoTokenizer

from llm_barber import load
from llm_barber.method.distance import Distance, usual_squares
from llm_barber.text.windows import windows_of

NORMS = ["after layer", "largest token", "its norm / median", "its share of squares", "largest channel's share"]
DIFFERENCES = ["of the difference", "… channels capped", "its relative error", "median token's"]


def states_of(model: str, tokens: Tensor) -> list[Tensor]:
    """The output of each decoder layer, float32, (tokens, hidden)."""
    loaded = load(model, dtype=torch.bfloat16)
    with torch.no_grad():
        outputs = loaded(input_ids=tokens, output_hidden_states=True, use_cache=False)
    # The last state of transformers is behind the last norm; the other states are what a layer gives the next one.
    return [state[0].float() for state in outputs.hidden_states[1:-1]]


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
    """The largest token's share of the squared difference, plain and with channels capped, and relative errors."""
    squares = (pruned - dense).square()
    of_tokens, norm = squares.sum(1), dense.square().sum(1)
    largest = int(norm.argmax())
    distance = Distance.of(usual_squares(dense[None]))
    capped = (squares * distance.weights).sum(1)
    shares = [tokens[largest] / tokens.sum() for tokens in (of_tokens, capped)]
    relative = of_tokens / norm
    return [*(f"{share:.0%}" for share in shares), f"{relative[largest]:.1%}", f"{relative.median():.1%}"]


def main() -> None:
    """Print a table by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="a checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("pruned", nargs="?", help="the same model, pruned")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=512, help="of the window (default: 512)")
    given = parser.parse_args()
    dense = model_folder(given.dense)
    text, tokenizer = given.text.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(dense)
    windows, _ = windows_of(text, tokenizer, given.tokens, bos=True)
    tokens = windows[:1]
    before = states_of(dense, tokens)
    after = states_of(given.pruned, tokens) if given.pruned else []
    rows = [
        [str(layer), *norms(state), *(differences(state, after[layer - 1]) if after else [])]
        for layer, state in enumerate(before, 1)
    ]
    title = f"{Path(dense).name}{f' and {Path(given.pruned).name}' if given.pruned else ''}: {given.tokens} tokens"
    headings = [*NORMS, *(DIFFERENCES if after else [])]
    keep("sinks", {"title": title, "headings": headings, "rows": rows})
    show(title, headings, rows)


if __name__ == "__main__":
    main()
