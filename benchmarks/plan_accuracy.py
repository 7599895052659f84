"""Compare the seconds and peak memory of `plan` with those of `prune`.

Each plan and each run is a process of its own, one after the other. SmolLM2-135M is the model if none is named. Let
nothing else run meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py --presets paper,mask,best
"""

import argparse
import json
import sys
import tempfile
from typing import Any

from common import call, keep, model_folder, show

PRUNE = """
import sys
from llm_barber import PruneConfig, prune
import json
print(prune(PruneConfig(**json.loads(sys.argv[1]))).to_json())
"""


def measure(model: str, preset: str, options: argparse.Namespace, folder: str) -> list[str]:
    """Plan and prune a model; return its row of the table."""
    settings: dict[str, Any] = {"samples": options.samples, "seqlen": options.seqlen, "preset": preset}
    given = [f"--{name}={value}" for name, value in settings.items()]
    plan = json.loads(call([sys.executable, "-m", "llm_barber", "plan", model, *given, "--json", "--quiet"]))
    run = {**settings, "model": model, "output": f"{folder}/out", "overwrite": True, "report": False}
    record = json.loads(call([sys.executable, "-c", PRUNE, json.dumps(run)]))
    seconds, memory = record["seconds"]["total"], record["peak_memory"]
    planned, planned_memory = plan["expected"]["seconds"], plan["expected"]["host_memory"]
    return [
        preset, f"{planned:.1f}", f"{seconds:.1f}", f"{planned / seconds - 1:+.0%}",
        f"{planned_memory / 2**30:.2f}", f"{memory / 2**30:.2f}", f"{planned_memory / memory - 1:+.0%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file")
    parser.add_argument("--presets", default="paper,mask")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    model = model_folder(options.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(model, preset, options, folder) for preset in options.presets.split(",")]
    headings = ["preset", "planned, s", "taken, s", "", "planned, GiB", "peak, GiB", ""]
    keep("plan_accuracy", {"model": options.model, "headings": headings, "rows": rows})
    show(f"plan and prune, {options.samples} × {options.seqlen} tokens", headings, rows)


if __name__ == "__main__":
    main()
