"""Measure how time grows with tokens and layers, and falls with the number of processes.

Synthetic LLaMA-shaped float32 checkpoints are pruned, in the compute dtype that suits the processor. Each run has
processes of its own, with one thread each. It prints seconds, peak memory, and the share of equal mask bits.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --real            # SmolLM2-135M in one process and in two
    python benchmarks/scaling.py --real --processes 1,2,4 --preset mask --dtype bfloat16
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from common import call, keep, model_folder, show
from safetensors.torch import load_file, save_file
from synthetic import write_llama

HIDDEN, MLP, VOCABULARY = 512, 1408, 1000


def prune(model: str, out: Path, preset: str, processes: int, *calibration: str) -> dict:
    """The record of a run in some processes, of one thread each."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [
        *start, "llm_barber", "prune", model, str(out), "--quiet", "--overwrite", "--no-report", "--preset", preset,
        *calibration,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call(command, environment)
    record: dict = json.loads((out / "barber.json").read_text())
    return record


def synthetic(folder: Path, layers: int, sequences: int, preset: str, processes: int = 1) -> tuple[dict, Path]:
    """The record of a run on a synthetic model, and its output."""
    model = folder / f"model{layers}"
    if not model.exists():
        write_llama(model, layers, HIDDEN, MLP, 8, VOCABULARY, torch.float32)
    tokens = torch.randint(0, VOCABULARY, (sequences, 256), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, folder / "tokens.safetensors")
    out = folder / f"out{processes}"
    return prune(str(model), out, preset, processes, "--calibration", str(folder / "tokens.safetensors")), out


def on_a_real_model(model: str, preset: str, samples: int, dtype: str, counts: list[int]) -> None:
    """Measure several numbers of processes on a real model: seconds, and whether masks are the same."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        how = ("--samples", str(samples), "--seqlen", "512", "--dtype", dtype)
        outs = [Path(name) / str(count) for count in counts]
        for count, out in zip(counts, outs, strict=True):
            seconds = prune(model, out, preset, count, *how)["seconds"]["total"]
            efficiency = rows[0][1] * rows[0][0] / seconds / count if rows else 1.0
            rows.append([count, seconds, efficiency, same_bits(outs[0], out)])
    keep("processes", {"model": Path(model).name, "preset": preset, "samples": samples, "dtype": dtype, "rows": rows})
    show(
        f"{Path(model).name}, preset {preset}, {samples} × 512 tokens, {dtype}, one thread a process, "
        f"{os.cpu_count()} cores",
        ["processes", "seconds", "efficiency", "mask bits the same"],
        [[str(count), f"{seconds:.1f}", f"{how_well:.0%}", f"{same:.4%}"] for count, seconds, how_well, same in rows],
    )


def same_bits(first_out: Path, second_out: Path) -> float:
    """Share of weights whose mask is the same in two pruned models."""
    same = total = 0
    for path in sorted(first_out.glob("*.safetensors")):
        first, second = load_file(path), load_file(second_out / path.name)
        for name, tensor in first.items():
            if name.endswith("_proj.weight"):
                same += int(((tensor != 0) == (second[name] != 0)).sum())
                total += tensor.numel()
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--sequences", default="8,16,32,64")
    parser.add_argument("--layers", default="2,4,8,16")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M instead, in --processes")
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens, with --real")
    parser.add_argument("--processes", default="1,2", help="numbers of processes, with --real")
    parser.add_argument("--dtype", default="float32", help="of computing, with --real")
    options = parser.parse_args()
    if options.real:
        counts = [int(count) for count in options.processes.split(",")]
        on_a_real_model(model_folder(None), options.preset, options.samples, options.dtype, counts)
        return
    sequences = [int(number) for number in options.sequences.split(",")]
    depths = [int(depth) for depth in options.layers.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = [(depths[1], windows) for windows in sequences] + [(depth, sequences[0]) for depth in depths]
        for layers, windows in sizes:
            record, _ = synthetic(folder, layers, windows, options.preset)
            seconds = record["seconds"]["layers"]
            rows.append(
                [layers, windows, 1, seconds, 1000 * seconds / (layers * windows), record["peak_memory"] / 2**30]
            )
        alone, first = synthetic(folder, depths[1], sequences[-1], options.preset)
        together, second = synthetic(folder, depths[1], sequences[-1], options.preset, 2)
        seconds, half = alone["seconds"]["layers"], together["seconds"]["layers"]
        rows.append(
            [
                depths[1],
                sequences[-1],
                2,
                half,
                1000 * half / (depths[1] * sequences[-1]),
                together["peak_memory"] / 2**30,
            ]
        )
        agreement = same_bits(first, second)
    results = {"efficiency of two processes": seconds / half / 2, "same mask bits": agreement}
    keep("scaling", {"preset": options.preset, "rows": rows, **results})
    show(
        f"preset {options.preset}, hidden {HIDDEN}, MLP {MLP}, float32 checkpoints, windows of 256 tokens",
        ["layers", "windows", "processes", "seconds in layers", "ms a layer and window", "peak memory, GiB"],
        [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows],
    )
    efficiency = results["efficiency of two processes"]
    print(f"two processes: {efficiency:.0%} efficient, {agreement:.4%} of the masks' bits the same")


if __name__ == "__main__":
    main()
