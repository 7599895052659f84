"""Compare the time of Wanda + rebuild with the floor that its matrix products set.

It also prints the time of each step. The floor: the FLOPs of five forward equivalents of the decoder layers (dense,
sparse, two for the backward, one after the rebuild), over the rate of matrix products of the layer's shapes, measured
in the same dtype and process.

    python benchmarks/rebuild_speed.py
    python benchmarks/rebuild_speed.py --samples 8 --threads 1          # the setting of the released program's times
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/rebuild_speed.py --dtypes bfloat16      # without AMX

LLaMA-2-7B's shapes on a GPU (not run yet); a model without a tokenizer is given random tokens:

    python benchmarks/synthetic.py 7b --hidden 4096 --mlp 11008 --heads 32 --vocabulary 32000 --dtype bfloat16
    python benchmarks/rebuild_speed.py --model 7b --samples 128 --seqlen 2048 --dtypes bfloat16 --device cuda
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import keep, model_folder, show
from safetensors.torch import save_file
from transformers import AutoConfig

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.model.device import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS

FORWARD_EQUIVALENTS = 5
STAGES = {
    "initial mask: inputs' statistics": ("llm_barber.model.block", "DecoderLayer", "visit_inputs"),
    "initial mask: ranking": ("llm_barber.method.initial_methods", None, "initial_mask"),
    "y_sparse, and block outputs after the rebuild": ("llm_barber.model.block", "DecoderLayer", "block_output"),
    "y_dense and gradients": ("llm_barber.method.rebuild", None, "block_gradients"),
    "  of which backward": ("torch.autograd", None, "grad"),
    "  of which per-sequence gradients, squared": ("llm_barber.masking.gradient_squares", "GradientSquares", "update"),
    "rebuild: ranking and swapping": ("llm_barber.method.rebuild", None, "rebuild_masks"),
    "layer output after the rebuild": ("llm_barber.model.block", "DecoderLayer", "final_output"),
}


def stopwatch(times: Counter[str]) -> Callable[[], None]:
    """Time the calls of `STAGES` from outside; returns what undoes it."""
    undo = []
    for label, (module_name, class_name, name) in STAGES.items():
        owner: Any = importlib.import_module(module_name)
        owner = getattr(owner, class_name) if class_name else owner
        original = getattr(owner, name)

        def timed(*args: Any, _original: Any = original, _label: str = label, **settings: Any) -> Any:
            began = time.perf_counter()
            result = _original(*args, **settings)
            times[_label] += time.perf_counter() - began
            return result

        setattr(owner, name, timed)
        undo.append((owner, name, original))
    return lambda: [setattr(owner, name, original) for owner, name, original in undo] and None


def shapes(report: RunReport) -> list[tuple[int, int]]:
    """(out, in) of a decoder layer's linears."""
    return [linear.shape for linear in report.layers[0].linears]


def forward_flops(report: RunReport, config: Any) -> float:
    """FLOPs of one forward of all decoder layers: linears, and causal attention (half of all pairs of tokens)."""
    sequences, tokens = report.calibration.sequences, report.calibration.tokens
    linears = sum(2 * rows * columns for rows, columns in shapes(report)) * sequences * tokens
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * sequences * tokens * tokens * width / 2
    return (linears + attention) * len(report.layers)


def matrix_rate(report: RunReport, dtype: torch.dtype, rows: int, device: torch.device) -> float:
    """FLOP/s of the products of a layer's linears with `rows` tokens, each shape by its share; median of 7."""
    flops = seconds = 0.0
    for out, into in shapes(report):
        weight, inputs = (torch.randn(size, into, dtype=dtype, device=device) for size in (out, rows))
        times = []
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        flops += 2 * rows * out * into
        seconds += statistics.median(times[1:])
    return flops / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: SmolLM2-135M from its package")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--initial", default="wanda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = model_folder(arguments.model)
    config = AutoConfig.from_pretrained(model)
    rows, stages = [], []
    for name in arguments.dtypes.split(","):
        times: Counter[str] = Counter()
        undo = stopwatch(times)
        with tempfile.TemporaryDirectory() as folder:
            text = {}
            if load_tokenizer(Path(model)) is None:
                tokens = torch.randint(0, config.vocab_size, (arguments.samples, arguments.seqlen))
                save_file({"input_ids": tokens}, Path(folder) / "tokens.safetensors")
                text = {"calibration": str(Path(folder) / "tokens.safetensors")}
            report = prune(
                PruneConfig(
                    model=model, output=Path(folder) / "out", initial=arguments.initial, samples=arguments.samples,
                    seqlen=arguments.seqlen, dtype=name, device=arguments.device, **text,
                )
            )  # fmt: skip
        undo()
        device = torch.device(arguments.device)
        most = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
        batch_rows = min(arguments.samples * arguments.seqlen, most)
        rate = matrix_rate(report, getattr(torch, name), batch_rows, device)
        floor = FORWARD_EQUIVALENTS * forward_flops(report, config) / rate
        total = report.seconds["total"]
        peak = report.peak_memory if report.peak_device_memory is None else report.peak_device_memory
        row = [name, f"{rate / 1e9:.0f}", f"{floor:.1f}", f"{total:.1f}", f"{total / floor:.2f}", f"{peak / 2**30:.2f}"]
        rows.append(row)
        stages.append(
            times | Counter({key: value for key, value in report.seconds.items() if key in ("read", "write")})
        )
    tokens = f"{arguments.samples} × {arguments.seqlen} tokens"
    title = f"{arguments.initial} + rebuild, {Path(model).name}, {tokens}"
    keep("rebuild_speed", {"title": title, "device": arguments.device, "rows": rows})
    show(title, ["dtype", "GFLOP/s", "floor, s", "run, s", "ratio", "peak memory of the device, GiB"], rows)
    if arguments.device != "cpu":  # whose stages run behind the clock
        return
    labels = [*STAGES, "read", "write"]
    names = arguments.dtypes.split(",")
    show("where the time goes, s", ["", *names], [[label, *(f"{t[label]:.2f}" for t in stages)] for label in labels])


if __name__ == "__main__":
    main()
