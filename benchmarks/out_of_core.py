"""Prune a checkpoint that is several times larger than the memory that the process may have.

A synthetic LLaMA-shaped checkpoint is written, and pruned by a process whose private memory the system limits
(`RLIMIT_DATA`, as `ulimit -d`), with `--memory` a little below. It prints sizes, peak memory and seconds.

    python benchmarks/out_of_core.py
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1.25, help="GiB that the process may have")
    parser.add_argument("--times", type=float, default=3.0, help="size of the checkpoint against that")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--preset", default="paper")
    options = parser.parse_args()
    hidden, mlp, vocabulary = 1024, 2816, 1000
    of_a_layer = 4 * (4 * hidden**2 + 3 * hidden * mlp)
    layers = -(-int(options.times * options.limit * 2**30) // of_a_layer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_llama(folder / "model", layers, hidden, mlp, 16, vocabulary, torch.float32)
        shape = (options.sequences, options.tokens)
        tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": tokens}, folder / "tokens.safetensors")
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        limit = int(options.limit * 2**30)
        command = [
            sys.executable, "-m", "llm_barber", "prune", str(model), str(folder / "out"), "--json", "--quiet",
            "--calibration", str(folder / "tokens.safetensors"), "--preset", options.preset, "--no-report",
            "--memory", str(int(0.95 * limit)),
        ]  # fmt: skip
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        if done.returncode:
            sys.exit(done.stderr)
        report = json.loads(done.stdout)
    itemsize = getattr(torch, report["dtype"]).itemsize
    row = {
        "checkpoint, GiB": size / 2**30,
        "limit, GiB": options.limit,
        "activations of one array, GiB": options.sequences * options.tokens * hidden * itemsize / 2**30,
        "peak resident, GiB": report["peak_memory"] / 2**30,
        "seconds": report["seconds"]["total"],
        "layers": layers,
    }
    keep("out_of_core", {"preset": options.preset, **row})
    show(
        f"preset {options.preset}, hidden {hidden}, MLP {mlp}, float32 checkpoint",
        list(row),
        [[f"{value:.2f}" for value in row.values()]],
    )


if __name__ == "__main__":
    main()
