"""Measure what fine-tuning wins back of what pruning lost. Resumable.

    python benchmarks/finetune.py --folder FOLDER --calibration c4-sample.txt --train builtin
    python benchmarks/finetune.py --folder FOLDER --targets 2:4 --presets mask,best --tokens 500000

SmolLM2-135M is pruned to each target by each preset, and trained by `examples/finetune.py` on --tokens tokens. It
prints a table: perplexity and KL from the dense model on each text of --texts, accuracies of --tasks, seconds. Models
and unfinished trainings are kept in FOLDER, so that the same command goes on; rows go to `benchmarks/results/finetune`.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from common import model_folder, show

from llm_barber import EvaluateConfig, PruneConfig, evaluate, prune
from llm_barber.usage import machine, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune as example

RESULTS = Path(__file__).parent / "results" / "finetune"
WINDOWS_A_STEP = 4


def main() -> None:
    """Prune, train and measure each preset at each target, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for pruned and trained models, 0.8 GB each")
    parser.add_argument("--model", help="default: SmolLM2-135M from its package")
    parser.add_argument("--targets", default="0.5,2:4")
    parser.add_argument("--presets", default="mask")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calibration-seqlen", type=int, default=1024)
    parser.add_argument("--train", default="builtin", help="texts to train on, with commas")
    parser.add_argument("--tokens", type=int, default=500_000, help="tokens to train on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--texts", default="wikitext2", help="held-out texts, with commas")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tasks", default="", help="tasks of lm-eval, with commas")
    parser.add_argument("--tasks-folder", help="files of the tasks")
    parser.add_argument("--limit", type=int, help="most examples of each task")
    options = parser.parse_args()
    dense, table, headings = model_folder(options.model), [], [""]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for target in options.targets.split(","):
        for preset in options.presets.split(","):
            pruned = options.folder / f"{preset}-{target.replace(':', 'of')}-{options.samples}"
            seconds = prune_to(target, preset, pruned, dense, options)
            trained, training_seconds = train(pruned, dense, options)
            for name, folder, took in (("", pruned, seconds), ("-trained", trained, training_seconds)):
                row = {"seconds": took, "machine": machine(), "versions": versions(), **measure(folder, dense, options)}
                (RESULTS / f"{pruned.name}{name}.json").write_text(json.dumps(row, indent=1) + "\n")
                numbers = [*(number for pair in row["texts"].values() for number in pair), *row["tasks"].values()]
                table.append([f"{preset}, {target}{name}", *(f"{number:.3f}" for number in numbers), f"{took:.0f}"])
                headings = ["", *(f"{text} {what}" for text in row["texts"] for what in ("perplexity", "KL"))]
                headings += [*row["tasks"], "seconds"]
    show("fine-tuning with zeros held", headings, table)


def prune_to(target: str, preset: str, folder: Path, dense: str, options: argparse.Namespace) -> float:
    """Prune into a folder, unless it is complete; seconds of the run."""
    amount: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    report = prune(
        PruneConfig(
            model=dense, output=folder, preset=preset, calibration=options.calibration, samples=options.samples,
            seqlen=options.calibration_seqlen, report=False, resume=True, **amount,
        )
    )  # fmt: skip
    return report.seconds["total"]


def train(pruned: Path, dense: str, options: argparse.Namespace) -> tuple[Path, float]:
    """Train; the folder, and seconds: steps that an earlier call made count as long as this call's."""
    steps = math.ceil(options.tokens / (options.seqlen * WINDOWS_A_STEP))
    out = Path(f"{pruned}-trained-{steps}")
    begun = max((int(path.name.split("-")[1]) for path in Path(f"{out}.training").glob("checkpoint-*")), default=0)
    arguments = [
        str(pruned), dense, options.train, str(out), "--steps", str(steps), "--seqlen", str(options.seqlen), "--batch",
        str(WINDOWS_A_STEP), "--rate", str(options.rate), "--save-steps", "25", *(["--bf16"] if options.bf16 else []),
    ]  # fmt: skip
    start = time.perf_counter()
    example.finetune(example.make_parser().parse_args(arguments))
    return out, (time.perf_counter() - start) * steps / max(1, steps - begun)


def measure(folder: Path, dense: str, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL on each text, and accuracies."""
    names = ("tasks", "tasks_folder", "limit")
    tasks = {name: getattr(options, name) for name in names} if options.tasks else {}
    result = evaluate(
        EvaluateConfig(
            model=str(folder), against=dense, text=tuple(options.texts.split(",")), dtype="float32",
            windows=options.windows, seqlen=options.seqlen, **tasks,
        )
    )  # fmt: skip
    return {
        "texts": {text.text: [text.perplexity, text.against.divergence] for text in result.texts if text.against},
        "tasks": {f"{task.task} {task.metric}": task.value for task in result.tasks},
    }


if __name__ == "__main__":
    main()
