"""Measure what rounding costs: of kept weights to int8, by the columns that share a scale, and of inputs by VNNI.

Kept weights: the linears of a pruned model are rounded and restored, as `pack --values int8` and reading do it. KL
divergence and perplexity are those of the rounded model against the unrounded one. Goal: a KL below 0.002 with about 5
bits a weight at 50 %. Inputs: VNNI rounds up to 8 rows of inputs of each product, here all of them are; KL is that of
the same rounded weights with exact inputs against them with rounded inputs. Everything else is float32.

Without --pruned it prunes the model, SmolLM2-135M from its package if none is named, by preset `mask` on little text.
It prints a row for each group, and one for the unrounded model.

    python benchmarks/rounding.py --text wikitext2-validation.txt --windows 16
    python benchmarks/rounding.py --text wikitext2-validation.txt --windows 16 --model gemma-3-270m.gguf
    python benchmarks/rounding.py --text wikitext2-validation.txt --pruned FOLDER --groups 64,128,0 --float32-scales
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import model_folder, show
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber import PruneConfig, load, prune
from llm_barber.checkpoint.rounding import LARGEST, relative_error, round_trip
from llm_barber.evaluation.texts import evaluation_windows
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.native.weight import STEP
from llm_barber.text.calibration import read_text

HEADINGS = [
    "columns of a scale", "scales", "bits of a weight", "error", "largest", "KL", "perplexity", "ratio",
    "KL, rounded inputs", "perplexity",
]  # fmt: skip
POSITIONS = 128  # whose logits are compared at once
SMALLEST_SCALE = 1e-37  # of inputs; with a smaller scale they are 0


def round_inputs(inputs: Tensor, group: int) -> Tensor:
    """Round inputs, (…, in) in float32, as a product by VNNI does: to int8, by the largest of each group of columns."""
    columns = inputs.shape[-1]
    length = min(group, columns)
    parts = nn.functional.pad(inputs, (0, -columns % length)).unflatten(-1, (-1, length))
    largest = parts.abs().amax(-1, keepdim=True)
    scales = torch.where(largest / LARGEST < SMALLEST_SCALE, 0, largest / LARGEST)
    factors = torch.where(scales > 0, LARGEST / largest, 0)
    return ((parts * factors).round() * scales).flatten(-2)[..., :columns]


@contextmanager
def rounded_inputs(linears: list[nn.Linear], group: int) -> Iterator[None]:
    """Round the inputs of linears, which have scales by `group` columns, inside a `with` statement; 0: by rows."""

    def round_first(linear: nn.Module, inputs: Any) -> tuple[Tensor]:
        assert isinstance(linear, nn.Linear)
        return (round_inputs(inputs[0], group or linear.in_features),)

    handles = [linear.register_forward_pre_hook(round_first) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_float32_scales(weight: Tensor, group: int) -> Tensor:
    """`round_trip` with scales that are not rounded."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(
        rows, -1, min(group, columns + -columns % group)
    )
    scales = padded.abs().amax(2, keepdim=True) / LARGEST
    restored = torch.where(scales > 0, (padded / scales).round() * scales, 0)
    return restored.view(rows, -1)[:, :columns].to(weight.dtype)


def hidden_states(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Last hidden states of each window, (tokens, hidden): smaller than logits."""
    return [model.base_model(window[None], use_cache=False).last_hidden_state[0] for window in windows]


def compare(
    model: PreTrainedModel, windows: Tensor, states: list[Tensor], reference: list[Tensor]
) -> tuple[float, float]:
    """KL divergence in nats of the reference's predictions from the others, and the perplexity of the others."""
    head = model.get_output_embeddings()
    divergence = loss = 0.0
    for window, exact, other in zip(windows, reference, states, strict=True):
        for start in range(0, len(window) - 1, POSITIONS):
            part = slice(start, min(start + POSITIONS, len(window) - 1))
            logs, exact_logs = (head(hidden[part]).float().log_softmax(-1) for hidden in (other, exact))
            loss -= logs.gather(1, window[1:][part, None]).double().sum().item()
            divergence += (exact_logs.exp() * (exact_logs - logs)).sum(1).double().sum().item()
    predicted = len(windows) * (windows.shape[1] - 1)
    return divergence / predicted, math.exp(loss / predicted)


def measure(model: PreTrainedModel, windows: Tensor, groups: list[int], float32_scales: bool) -> list[list[str]]:
    """Rows of the table. Weights are rounded in place."""
    layers = [name for name, _ in model.named_modules() if ".layers." in f".{name}"]
    linears = [module for module in map(model.get_submodule, layers) if isinstance(module, nn.Linear)]
    weights = [linear.weight.data.bfloat16() for linear in linears]
    total = sum(weight.numel() for weight in weights)
    kept = sum(int((weight != 0).sum()) for weight in weights) / total
    reference = hidden_states(model, windows)
    _, exact = compare(model, windows, reference, reference)
    rows = [["not rounded", "–", f"{16 * kept + 1:.2f}", "–", "–", "–", f"{exact:.3f}", "–", "–", "–"]]
    for group in groups:
        for bits in (16, 32) if float32_scales else (16,):
            errors, bits_of_scales = [], 0
            for linear, weight in zip(linears, weights, strict=True):
                columns = group or weight.shape[1]
                restored = (round_trip if bits == 16 else with_float32_scales)(weight, columns)
                errors.append(relative_error(weight, restored))
                bits_of_scales += bits * weight.shape[0] * -(-weight.shape[1] // columns)
                linear.weight.data.copy_(restored)
            states = hidden_states(model, windows)
            divergence, perplexity = compare(model, windows, states, reference)
            rows.append(
                [str(group or "a row"), f"{'bfloat16' if bits == 16 else 'float32'}",
                 f"{8 * kept + 1 + bits_of_scales / total:.2f}", f"{sum(errors) / len(errors):.2%}",
                 f"{max(errors):.2%}", f"{divergence:.5f}", f"{perplexity:.3f}", f"{perplexity / exact:.4f}"]
            )  # fmt: skip
            if group % STEP or bits != 16:  # VNNI does not multiply such weights
                rows[-1] += ["–", "–"]
                continue
            with rounded_inputs(linears, group):
                divergence, perplexity = compare(model, windows, hidden_states(model, windows), states)
            rows[-1] += [f"{divergence:.5f}", f"{perplexity:.3f}"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="held-out text, by which nothing else is reported")
    parser.add_argument("--model", help="dense model: a folder, a hub id or a GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--pruned", type=Path, help="folder of a pruned model in bfloat16; made if it is missing")
    parser.add_argument("--groups", default="32,64,128,0", help="columns of a scale; 0: a row")
    parser.add_argument("--float32-scales", action="store_true", help="measure scales in float32, too")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        pruned = options.pruned or Path(place) / "pruned"
        if not pruned.exists():
            model = model_folder(options.model)
            prune(PruneConfig(model=model, output=pruned, preset="mask", samples=4, seqlen=256))
        tokenizer = load_tokenizer(pruned)
        windows = evaluation_windows(options.text, read_text(options.text), tokenizer, options.seqlen, options.windows)
        pruning = time.perf_counter() - start
        groups = [int(group) for group in options.groups.split(",")]
        rows = measure(load(pruned, dtype=torch.float32), windows, groups, options.float32_scales)
    seconds = time.perf_counter() - start - pruning
    name = options.pruned or options.model or "SmolLM2-135M"
    show(f"{name}: {options.windows} windows of {options.seqlen} tokens; {seconds:.0f} s", HEADINGS, rows)


if __name__ == "__main__":
    main()
