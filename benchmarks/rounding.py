"""Measure what rounding kept weights to int8 costs, by the columns that share a scale and the type of the scales.

A pruned model's linears are rounded and restored; KL divergence is that of the unrounded model's predictions from the
rounded one's, both computed in float32. Goal: below 0.002 with about 5 bits a weight at 50 %. Without --pruned it
prunes SmolLM2-135M by preset `mask` on little text. It prints a row for each way to round.

    python benchmarks/rounding.py --text wikitext2-validation.txt
    python benchmarks/rounding.py --text wikitext2-validation.txt --pruned FOLDER --windows 4 --groups 64,128,0
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from common import model_folder, show
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_barber import PruneConfig, load, prune
from llm_barber.checkpoint.rounding import LARGEST, relative_error, round_trip
from llm_barber.evaluation.texts import evaluation_windows
from llm_barber.loading.opening import load_tokenizer
from llm_barber.text.calibration import read_text

HEADINGS = ["columns of a scale", "scales", "bits of a weight", "error", "largest", "KL", "perplexity", "ratio"]


def with_float32_scales(weight: Tensor, group: int) -> Tensor:
    """`round_trip` with scales that are not rounded."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(
        rows, -1, min(group, columns + -columns % group)
    )
    scales = padded.abs().amax(2, keepdim=True) / LARGEST
    restored = torch.where(scales > 0, (padded / scales).round() * scales, 0)
    return restored.view(rows, -1)[:, :columns].to(weight.dtype)


def log_probabilities(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Compute log probabilities of each window's tokens after its first, (tokens, vocabulary)."""
    return [model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for window in windows]


def perplexity(logs: list[Tensor], windows: Tensor) -> float:
    losses = [
        -log.gather(1, window[1:, None]).double().mean().item() for log, window in zip(logs, windows, strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="held-out text, by which nothing else is reported")
    parser.add_argument("--pruned", help="folder of a pruned model in bfloat16")
    parser.add_argument("--groups", default="32,64,128,256,0", help="columns of a scale; 0: a row")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        pruned = options.pruned
        if pruned is None:
            pruned = str(Path(place) / "pruned")
            prune(PruneConfig(model=model_folder(None), output=pruned, preset="mask", samples=4, seqlen=256))
        tokenizer = load_tokenizer(Path(pruned))
        windows = evaluation_windows(options.text, read_text(options.text), tokenizer, options.seqlen, options.windows)
        model = load(pruned, dtype=torch.float32)
        linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in f".{name}"
        ]
        weights = [linear.weight.data.bfloat16() for linear in linears]
        kept = sum(int((weight != 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        reference = log_probabilities(model, windows)
        exact = perplexity(reference, windows)
        rows = [["not rounded", "–", f"{16 * kept + 1:.2f}", "–", "–", "–", f"{exact:.3f}", "–"]]
        for group in map(int, options.groups.split(",")):
            for scales, bits in (("bfloat16", 16), ("float32", 32)):
                errors, of_scales = [], 0
                for linear, weight in zip(linears, weights, strict=True):
                    columns = group or weight.shape[1]
                    restored = (round_trip if bits == 16 else with_float32_scales)(weight, columns)
                    errors.append(relative_error(weight, restored))
                    of_scales += bits * weight.shape[0] * -(-weight.shape[1] // columns)
                    linear.weight.data.copy_(restored)
                logs = log_probabilities(model, windows)
                distances = [
                    (a.exp() * (a - b)).sum(1).double().mean().item() for a, b in zip(reference, logs, strict=True)
                ]
                measured = perplexity(logs, windows)
                rows.append(
                    [str(group or "a row"), scales, f"{8 * kept + 1 + of_scales / sum(w.numel() for w in weights):.2f}",
                     f"{sum(errors) / len(errors):.2%}", f"{max(errors):.2%}", f"{sum(distances) / len(distances):.5f}",
                     f"{measured:.3f}", f"{measured / exact:.4f}"]
                )  # fmt: skip
    show(f"{pruned}: {options.windows} windows of {options.seqlen} tokens", HEADINGS, rows)


if __name__ == "__main__":
    main()
