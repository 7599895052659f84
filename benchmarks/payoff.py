"""Measure a pruned model, packed and dense: bytes on disk, memory, tokens per second on the CPU.

Masks are by magnitude: sizes and speeds depend on the share of pruned weights, not on which these are. Runs take turns;
the fastest counts. It prints a row for each target and dtype.

    python benchmarks/payoff.py
    python benchmarks/payoff.py --model FOLDER --targets 0.5,0.6,0.7,2:4,4:8 --dtypes bfloat16
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import model_folder, show
from torch import nn
from transformers import PreTrainedModel

from llm_barber import PackConfig, PruneConfig, load, native, pack, prune
from llm_barber.runtime.packed_linear import PackedLinear

HEADINGS = [
    "pruned", "dtype", "disk: dense MB", "packed MB", "share", "linears: dense MB", "kept packed MB", "share",
    "decode: dense tokens/s", "kept packed", "ratio", "prefill: dense tokens/s", "kept packed", "ratio",
]  # fmt: skip


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the packed linears' weights, dense and as they are."""
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    dense = sum(module.shape[0] * module.shape[1] * module.values.element_size() for module in linears)
    buffers = [buffer for module in linears for buffer in module.buffers() if buffer is not None]
    return dense, sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def fastest(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, the fastest of several; they take turns, so that a busy moment meets all."""
    seconds = [float("inf")] * len(works)
    for _ in range(repeats):
        for number, work in enumerate(works):
            start = time.perf_counter()
            work()
            seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds


def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    """Greedy decoding of one sequence from a prompt of 8 tokens."""
    prompt = torch.arange(100, 108)[None]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def prefill(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    """One forward pass."""
    prompt = torch.arange(100, 100 + tokens)[None]
    return lambda: model(prompt, logits_to_keep=1, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: SmolLM2-135M from its package")
    parser.add_argument("--targets", default="0.5,0.7,2:4", help="sparsities and N:M patterns")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--decode", type=int, default=32, help="new tokens")
    parser.add_argument("--prefill", type=int, default=256, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-c", action="store_true", help="as where the C extension was not built")
    options = parser.parse_args()
    if options.without_c:
        native.library = lambda: None
    model = model_folder(options.model)
    rows = []
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        for target in options.targets.split(","):
            pruned, packed = Path(place) / f"pruned-{target}", Path(place) / f"packed-{target}"
            wanted = {"pattern": target} if ":" in target else {"sparsity": float(target)}
            prune(
                PruneConfig(
                    model=model, output=pruned, initial="magnitude", rebuild=False, samples=2, seqlen=128, **wanted
                )
            )
            pack(PackConfig(model=str(pruned), output=packed))
            for name in options.dtypes.split(","):
                dtype: torch.dtype = getattr(torch, name)
                models = [load(pruned, dtype=dtype), load(packed, keep_packed=True, dtype=dtype)]
                assert any(isinstance(module, nn.Linear) for module in models[0].modules())
                in_memory = memory(models[1])
                decode = [
                    options.decode / seconds
                    for seconds in fastest([decoding(m, options.decode) for m in models], options.repeats)
                ]
                read = [
                    options.prefill / seconds
                    for seconds in fastest([prefill(m, options.prefill) for m in models], options.repeats)
                ]
                disk = size(pruned), size(packed)
                rows.append(
                    [target, name, f"{disk[0] / 1e6:.0f}", f"{disk[1] / 1e6:.0f}", f"{disk[1] / disk[0]:.1%}",
                     f"{in_memory[0] / 1e6:.0f}", f"{in_memory[1] / 1e6:.0f}", f"{in_memory[1] / in_memory[0]:.1%}",
                     f"{decode[0]:.1f}", f"{decode[1]:.1f}", f"{decode[1] / decode[0]:.2f}",
                     f"{read[0]:.0f}", f"{read[1]:.0f}", f"{read[1] / read[0]:.2f}"]
                )  # fmt: skip
    show(
        f"{Path(model).name}, files in its dtype; decode: batch 1, {options.decode} tokens, "
        f"prefill: {options.prefill}; {'in C' if native.library() else 'with NumPy'}",
        HEADINGS,
        rows,
    )


if __name__ == "__main__":
    main()
