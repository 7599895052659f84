"""Measure what fine-tuning wins back of what pruning lost, beside more calibration text for the same time. Resumable.

    python benchmarks/finetune.py --folder FOLDER --calibration c4-sample.txt --train builtin
    python benchmarks/finetune.py --folder FOLDER --targets 2:4 --presets mask,best --tokens 500000 --more

SmolLM2-135M is pruned to each target by each preset, and trained by `examples/finetune.py` on --tokens tokens. It
prints a table: perplexity and KL from the dense model on each text of --texts, accuracies of --tasks, seconds. Models
and unfinished trainings are kept in FOLDER, finished rows in `benchmarks/results/finetune`: the same command goes on.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from common import model_folder, show
from transformers import AutoTokenizer

from llm_barber import EvaluateConfig, PruneConfig, evaluate, prune
from llm_barber.settings.presets import PRESETS, Preset, Refine
from llm_barber.settings.refining import sequences_a_step, windows_in_key
from llm_barber.text.calibration import read_text
from llm_barber.text.windows import windows_of
from llm_barber.usage import machine, versions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune as example

RESULTS = Path(__file__).parent / "results" / "finetune"
WINDOWS_A_STEP = 4


def target_of(text: str) -> dict[str, Any]:
    """Settings of `prune` for a sparsity or N:M."""
    return {"pattern": text} if ":" in text else {"sparsity": float(text)}


class Rows:
    """Rows of the table, each computed once.

    Args:
        options: of the command line.
        dense: folder of the dense model.
    """

    def __init__(self, options: argparse.Namespace, dense: str) -> None:
        self.options, self.dense = options, dense

    def row(self, name: str, key: dict[str, Any], make: Any) -> dict[str, Any]:
        """The row of this name, kept or computed: figures of the folder that `make` returns with its seconds."""
        path = RESULTS / f"{name}.json"
        key = {**key, **{name: getattr(self.options, name) for name in ("texts", "windows", "tasks", "limit")}}
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
            return kept
        folder, seconds = make()
        row = {"key": key, "seconds": seconds, "machine": machine(), "versions": versions(), **self.measure(folder)}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
        return row

    def text_key(self, preset: str, samples: int) -> dict[str, Any]:
        """Give the calibration text as a part of a row's key."""
        text = {"calibration": self.options.calibration, "samples": samples, "seqlen": self.options.calibration_seqlen}
        if PRESETS[Preset(preset)].refine is Refine.TUNE:
            text |= windows_in_key(sequences_a_step(samples * self.options.calibration_seqlen))
        return text

    def measure(self, folder: Path) -> dict[str, Any]:
        """Perplexity and KL on each text, and accuracies."""
        names = ("tasks", "tasks_folder", "limit")
        tasks = {name: getattr(self.options, name) for name in names} if self.options.tasks else {}
        result = evaluate(
            EvaluateConfig(
                model=str(folder), against=self.dense, text=tuple(self.options.texts.split(",")), dtype="float32",
                windows=self.options.windows, seqlen=self.options.seqlen, **tasks,
            )
        )  # fmt: skip
        return {
            "texts": {t.text: [t.perplexity, t.against.divergence] for t in result.texts if t.against is not None},
            "tasks": {f"{task.task} {task.metric}": task.value for task in result.tasks},
        }

    def pruned(self, target: str, preset: str, samples: int) -> tuple[Path, float]:
        """Prune; the folder and the seconds."""
        folder = Path(self.options.folder) / f"{preset}-{target.replace(':', 'of')}-{samples}"
        report = prune(
            PruneConfig(
                model=self.dense, output=folder, preset=preset, calibration=self.options.calibration, samples=samples,
                seqlen=self.options.calibration_seqlen, report=False, resume=True, **target_of(target),
            )
        )  # fmt: skip
        return folder, report.seconds["total"]

    def samples_for(self, seconds: float, seconds_of_pruning: float) -> int:
        """Give the number of calibration windows that are pruned in so many seconds, or all that the text has."""
        text, seqlen = self.options.calibration, self.options.calibration_seqlen
        samples = round(self.options.samples * seconds / seconds_of_pruning)
        tokenizer = AutoTokenizer.from_pretrained(self.dense)
        return min(samples, len(windows_of(read_text(text, samples * seqlen), tokenizer, seqlen, bos=True)[0]))

    def trained(self, pruned: Path, steps: int) -> tuple[Path, float]:
        """Train; the folder and the seconds, those of the steps that an earlier call made as long as this call's."""
        out = Path(f"{pruned}-trained-{steps}")
        begun = max((int(path.name.split("-")[1]) for path in Path(f"{out}.training").glob("checkpoint-*")), default=0)
        options = example.make_parser().parse_args(
            [str(pruned), self.dense, self.options.train, str(out), "--steps", str(steps), "--seqlen",
             str(self.options.seqlen), "--batch", str(WINDOWS_A_STEP), "--rate", str(self.options.rate),
             "--save-steps", "25", *(["--bf16"] if self.options.bf16 else [])]
        )  # fmt: skip
        start = time.perf_counter()
        example.finetune(options)
        return out, (time.perf_counter() - start) * steps / max(1, steps - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="for pruned and trained models, 0.8 GB each while training")
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
    parser.add_argument(
        "--more",
        action="store_true",
        help="also prune with more text, for as long as pruning and training took, or with all of it",
    )
    parser.add_argument("--texts", default="wikitext2", help="held-out texts, with commas")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tasks", default="", help="tasks of lm-eval, with commas")
    parser.add_argument("--tasks-folder", help="files of the tasks")
    parser.add_argument("--limit", type=int, help="most examples of each task")
    options = parser.parse_args()
    rows, table = Rows(options, model_folder(options.model)), []
    steps = math.ceil(options.tokens / (options.seqlen * WINDOWS_A_STEP))
    for target in options.targets.split(","):
        for preset in options.presets.split(","):
            name = f"{preset}-{target.replace(':', 'of')}"
            key = {"model": options.model, "target": target, "preset": preset}
            key |= rows.text_key(preset, options.samples)
            made: dict[str, Any] = {}

            def make_pruned(name: str = name, target: str = target, preset: str = preset) -> tuple[Path, float]:
                return rows.pruned(target, preset, options.samples)

            made[f"{preset}, {target}"] = before = rows.row(name, key, make_pruned)
            training = {"steps": steps, "train": options.train, "rate": options.rate, "bf16": options.bf16}
            after = rows.row(
                f"{name}-trained", {**key, **training}, lambda make=make_pruned: rows.trained(make()[0], steps)
            )
            made[f"{preset}, {target}, trained on {steps * WINDOWS_A_STEP * options.seqlen:,} tokens"] = after
            if options.more:
                samples = rows.samples_for(before["seconds"] + after["seconds"], before["seconds"])
                made[f"{preset}, {target}, {samples} windows of calibration"] = rows.row(
                    f"{name}-more",
                    {**key, **rows.text_key(preset, samples)},
                    lambda t=target, p=preset, n=samples: rows.pruned(t, p, n),
                )
            for title, row in made.items():
                texts = [f"{number:.3f}" for pair in row["texts"].values() for number in pair]
                table.append(
                    [title, *texts, *(f"{value:.3f}" for value in row["tasks"].values()), f"{row['seconds']:.0f}"]
                )
    last = next(reversed(list(made.values())))
    headings = [f"{text} {what}" for text in last["texts"] for what in ("perplexity", "KL")]
    show("fine-tuning with zeros held", ["", *headings, *last["tasks"], "seconds"], table)


if __name__ == "__main__":
    main()
