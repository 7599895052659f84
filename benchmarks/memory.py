"""Measure peak memory against the number of decoder layers: it should not grow.

Synthetic LLaMA-shaped float32 checkpoints of 4 to 32 layers of the same width are pruned, each in a process of its own.
It prints the size of each checkpoint, peak memory and seconds.

    python benchmarks/memory.py                    # the published method
    python benchmarks/memory.py --preset mask
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from common import call, keep, show
from safetensors.torch import save_file
from synthetic import write_llama


def measure(layers: int, hidden: int, mlp: int, preset: str) -> tuple[float, float, float]:
    """Checkpoint size, peak resident memory (GiB) and seconds of a prune run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_llama(folder / "model", layers, hidden, mlp, 16, 1000, torch.float32)
        tokens = torch.randint(0, 1000, (4, 256), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": tokens}, folder / "tokens.safetensors")
        command = [
            sys.executable, "-m", "llm_barber", "prune", str(model), str(folder / "out"), "--json", "--quiet",
            "--calibration", str(folder / "tokens.safetensors"), "--preset", preset,
        ]  # fmt: skip
        report = json.loads(call(command))
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        return size / 2**30, report["peak_memory"] / 2**30, report["seconds"]["total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--preset", default="paper")
    options = parser.parse_args()
    rows = []
    first = None
    for layers in (int(part) for part in options.layers.split(",")):
        size, peak, seconds = measure(layers, options.hidden, options.mlp, options.preset)
        first = first or peak
        rows.append([str(layers), f"{size:.2f}", f"{peak:.3f}", f"{peak / first - 1:+.1%}", f"{seconds:.1f}"])
    keep("memory", {"preset": options.preset, "rows": rows})
    show(
        f"{options.preset}, hidden {options.hidden}, MLP {options.mlp}, float32 checkpoints, 4 × 256 tokens",
        ["layers", "checkpoint, GiB", "peak memory, GiB", "against the first", "seconds"],
        rows,
    )


if __name__ == "__main__":
    main()
