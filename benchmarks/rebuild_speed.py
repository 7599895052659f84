"""Compare the time of Wanda + rebuild with the floor that its matrix products set.

The floor: the FLOPs of five forward equivalents of the decoder layers (dense, sparse, two for the backward, one after
the rebuild), over the rate of matrix products of the layer's shapes, measured in the same dtype and process.

    python benchmarks/rebuild_speed.py
    python benchmarks/rebuild_speed.py --samples 8 --threads 1          # the setting of the released program's times
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/rebuild_speed.py --dtypes bfloat16      # without AMX

LLaMA-2-7B's shapes on a GPU (not run yet); a model without a tokenizer is given random tokens:

    python benchmarks/synthetic.py 7b --hidden 4096 --mlp 11008 --heads 32 --vocabulary 32000 --dtype bfloat16
    python benchmarks/rebuild_speed.py --model 7b --samples 128 --seqlen 2048 --dtypes bfloat16 --device cuda
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import keep, model_folder, show
from safetensors.torch import save_file
from transformers import AutoConfig

from llm_barber import PruneConfig, RunReport, prune

FORWARD_EQUIVALENTS = 5
ROWS = 2048  # of inputs whose products are timed: the batch of a CPU
HEADINGS = ["dtype", "GFLOP/s", "floor, s", "run, s", "ratio", "peak memory of the device, GiB"]


def main() -> None:
    """Measure each dtype and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: SmolLM2-135M from its package")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--initial", default="wanda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = model_folder(options.model)
    rows = [measure(model, dtype, options) for dtype in options.dtypes.split(",")]
    title = f"{options.initial} + rebuild, {Path(model).name}, {options.samples} × {options.seqlen} tokens"
    keep("rebuild_speed", {"title": title, "device": options.device, "rows": rows})
    show(title, HEADINGS, rows)


def measure(model: str, dtype: str, options: argparse.Namespace) -> list[str]:
    """The row of a dtype."""
    config = AutoConfig.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        text = {}
        if not (Path(model) / "tokenizer.json").exists():
            tokens = torch.randint(0, config.vocab_size, (options.samples, options.seqlen))
            save_file({"input_ids": tokens}, Path(folder) / "tokens.safetensors")
            text = {"calibration": str(Path(folder) / "tokens.safetensors")}
        report = prune(
            PruneConfig(
                model=model, output=Path(folder) / "out", initial=options.initial, samples=options.samples,
                seqlen=options.seqlen, dtype=dtype, device=options.device, report=False, **text,
            )
        )  # fmt: skip
    rate = matrix_rate(report, getattr(torch, dtype), torch.device(options.device))
    floor = FORWARD_EQUIVALENTS * forward_flops(report, config) / rate
    total = report.seconds["total"]
    peak = report.peak_device_memory or report.peak_memory
    return [
        dtype, f"{rate / 1e9:.0f}", f"{floor:.1f}", f"{total:.1f}", f"{total / floor:.2f}", f"{peak / 2**30:.2f}"
    ]  # fmt: skip


def forward_flops(report: RunReport, config: Any) -> float:
    """FLOPs of one forward of all decoder layers: linears, and causal attention (half of all pairs of tokens)."""
    sequences, tokens = report.calibration.sequences, report.calibration.tokens
    shapes = [linear.shape for linear in report.layers[0].linears]
    linears = sum(2 * rows * columns for rows, columns in shapes) * sequences * tokens
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * sequences * tokens * tokens * config.num_attention_heads * head
    return float(linears + attention) * len(report.layers)


def matrix_rate(report: RunReport, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the products of a layer's linears, each shape by its share; median of 7."""
    flops = seconds = 0.0
    for out, into in (linear.shape for linear in report.layers[0].linears):
        weight, inputs = (torch.randn(size, into, dtype=dtype, device=device) for size in (out, ROWS))
        times = []
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        flops += 2 * ROWS * out * into
        seconds += statistics.median(times[1:])
    return flops / seconds


if __name__ == "__main__":
    main()
