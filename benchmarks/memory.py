"""Measure peak memory: against the number of decoder layers, and where the system allows less than the model takes.

Synthetic LLaMA-shaped float32 checkpoints of one width are pruned, each in a process of its own. With --limit, the
system limits that process's private memory (`RLIMIT_DATA`, as `ulimit -d`), and `--memory` is a little below.

    python benchmarks/memory.py                                 # peak memory hardly grows with layers
    python benchmarks/memory.py --preset mask
    python benchmarks/memory.py --layers 66 --limit 1.05 --sequences 32         # a model of three times the limit
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import keep, show
from safetensors.torch import save_file
from synthetic import write_llama

HIDDEN, MLP, VOCABULARY, TOKENS = 1024, 2816, 1000, 256
HEADINGS = ["layers", "checkpoint, GiB", "peak memory, GiB", "against the first", "seconds"]


def main() -> None:
    """Prune models of each depth and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--sequences", type=int, default=4, help=f"of {TOKENS} tokens")
    parser.add_argument("--limit", type=float, help="GiB of private memory that the process may have")
    options = parser.parse_args()
    measured = [measure(int(layers), options) for layers in options.layers.split(",")]
    rows = [
        [str(layers), f"{size:.2f}", f"{peak:.3f}", f"{peak / measured[0][2] - 1:+.1%}", f"{seconds:.1f}"]
        for layers, size, peak, seconds in measured
    ]
    title = f"{options.preset}, hidden {HIDDEN}, {options.sequences} × {TOKENS} tokens, limit {options.limit or 'none'}"
    keep("memory", {"title": title, "rows": rows})
    show(title, HEADINGS, rows)


def measure(layers: int, options: argparse.Namespace) -> tuple[int, float, float, float]:
    """Layers, size of the checkpoint and peak resident memory (GiB), seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_llama(folder / "model", layers, HIDDEN, MLP, 16, VOCABULARY, torch.float32)
        shape = (options.sequences, TOKENS)
        tokens = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": tokens}, folder / "tokens.safetensors")
        command = [
            sys.executable, "-m", "llm_barber", "prune", str(model), str(folder / "out"), "--json", "--quiet",
            "--no-report", "--calibration", str(folder / "tokens.safetensors"), "--preset", options.preset,
        ]  # fmt: skip
        if options.limit:
            limit = int(options.limit * 2**30)
            command += ["--memory", str(int(0.95 * limit))]
        done = subprocess.run(
            command, capture_output=True, text=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if options.limit else None,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        report = json.loads(done.stdout)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        return layers, size / 2**30, report["peak_memory"] / 2**30, report["seconds"]["total"]


if __name__ == "__main__":
    main()
