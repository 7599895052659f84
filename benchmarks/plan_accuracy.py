"""Compare the seconds and peak memory of `plan` with those of `prune`, on three models.

Each model is pruned by two presets. Models: SmolLM2-135M and two synthetic LLaMA-shaped checkpoints, or others. Each
plan and each run is a process of its own. With `--times 2` each runs twice and the least of the seconds counts, since
other load only adds to them; CPU seconds are printed beside them for the same reason. It takes about a quarter of an
hour on an idle core.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import call, keep, model_folder, show
from safetensors.torch import save_file
from synthetic import write_llama

# Layers, hidden size, MLP; of synthetic models.
SIZES = ((8, 512, 1408), (4, 1024, 2816))
SEQUENCES, TOKENS = 8, 512
VOCABULARY = 4000
STAGES = {
    "embed": ("embed",), "allocate": ("allocate",), "read": ("read",), "write": ("write", "keep"),
    "layers": ("initial", "rebuild", "refine", "tune", "propagate"),
}  # fmt: skip


# Prunes, and prints the record with the CPU seconds, which other work on the machine changes less than the clock's.
PRUNE = """
import json, sys, time
from llm_barber import PruneConfig, prune
settings = json.loads(sys.argv[1])
began = time.process_time()
report = prune(PruneConfig(**settings))
print(json.dumps(json.loads(report.to_json()) | {"cpu": time.process_time() - began}))
"""


@dataclass(frozen=True)
class Subject:
    """A model to plan and to prune."""

    label: str
    model: str
    calibration: str = "builtin"


def printed(*arguments: str) -> dict[str, Any]:
    """Run a command and parse the record that it prints."""
    record: dict[str, Any] = json.loads(call([sys.executable, *arguments]))
    return record


def random_models(folder: Path) -> list[Subject]:
    """Synthetic checkpoints with random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = folder / "tokens.safetensors"
    models = []
    save_file({"input_ids": torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=generator)}, tokens)
    for layers, hidden, mlp in SIZES:
        model = write_llama(folder / str(hidden), layers, hidden, mlp, hidden // 64, VOCABULARY, torch.float32)
        models.append(Subject(f"random, {layers} × {hidden}", str(model), str(tokens)))
    return models


def subjects(folder: Path, names: list[str]) -> list[Subject]:
    """The models that are named, with the text that comes with the program, if they are real."""
    models = []
    for name in names:
        if name == "random":
            models += random_models(folder)
        elif name == "smollm2":
            models.append(Subject("SmolLM2-135M", model_folder(None)))
        else:
            models.append(Subject(Path(name).stem, model_folder(name)))
    return models


def measure(folder: Path, subject: Subject, preset: str, dtype: str, times: int) -> list[list[str]]:
    """Plan and prune a model; return its rows of the two tables."""
    label, model, calibration = subject.label, subject.model, subject.calibration
    plan = [
        "-m", "llm_barber", "plan", model, "--calibration", calibration, "--samples", str(SEQUENCES),
        "--seqlen", str(TOKENS), "--preset", preset, "--dtype", dtype, "--json", "--quiet",
    ]  # fmt: skip
    settings = {
        "model": model, "output": str(folder / "out"), "calibration": calibration, "samples": SEQUENCES,
        "seqlen": TOKENS, "preset": preset, "dtype": dtype, "overwrite": True, "report": False,
    }  # fmt: skip
    run = min((printed(*plan)["runs"][0] for _ in range(times)), key=lambda run: float(run["seconds"]))
    reports = [printed("-c", PRUNE, json.dumps(settings)) for _ in range(times)]
    report = min(reports, key=lambda report: report["seconds"]["total"])
    seconds, peak = report["seconds"]["total"], max(report["peak_memory"] for report in reports)
    by_stage = {stage["name"]: stage["seconds"] for stage in run["stages"]}
    stages = [
        f"{sum(by_stage[name] for name in names):.1f} / {report['seconds'][stage]:.1f}"
        for stage, names in STAGES.items()
    ]
    return [
        [
            label, preset, f"{run['seconds']:.1f}", f"{seconds:.1f}", f"{run['seconds'] / seconds - 1:+.0%}",
            f"{report['cpu']:.1f}", f"{run['seconds'] / report['cpu'] - 1:+.0%}",
            f"{run['host_memory'] / 2**30:.2f}", f"{peak / 2**30:.2f}", f"{run['host_memory'] / peak - 1:+.0%}",
            run["bottleneck"],
        ],
        [label, preset, *stages],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="paper,mask")
    parser.add_argument("--models", default="smollm2,random", help="those, or folders, hub ids and GGUF files")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--times", type=int, default=1)
    options = parser.parse_args()
    rows, stages = [], []
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects(Path(folder), options.models.split(",")):
            for preset in options.presets.split(","):
                measurement = measure(Path(folder), subject, preset, options.dtype, options.times)
                print(" | ".join(measurement[0]), file=sys.stderr)
                rows.append(measurement[0])
                stages.append(measurement[1])
    headings = ["model", "preset", "planned, s", "taken, s", "", "CPU s", ""]
    headings += ["planned, GiB", "peak, GiB", "", "bottleneck"]
    keep("plan_accuracy", {"dtype": options.dtype, "times": options.times, "headings": headings, "rows": rows})
    show("plan and prune", headings, rows)
    show("seconds, planned / taken", ["model", "preset", *STAGES], stages)


if __name__ == "__main__":
    main()
