"""Measure llm-compressor's SparseGPT and Wanda on our calibration tokens and texts. Resumable.

llm-compressor pins other versions of transformers: give it an environment of its own.

    python3 -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/llm_compressor.py --python PEER/bin/python --data DATA [--samples 64 --seqlen 1024 --windows 32]

DATA is that of `quality.py`, whose settings are the defaults. llm-compressor computes in float32. It prints perplexity,
divergence and seconds of each row. Finished rows are kept in `benchmarks/results/NAME/llm-compressor.json` and are not
computed again.
"""

import argparse
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import call, machine, model_folder, show
from quality_settings import CALIBRATION, DEFAULT_NAME, ROOT, TARGETS, TASK_TARGETS, TASKS, TEST
from safetensors.torch import save_file

from llm_barber.cli.progress import ConsoleProgress
from llm_barber.comparison.paired import ACCURACY
from llm_barber.evaluation.evaluate import Evaluator
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.text.calibration import load_calibration

# Program for that environment: it prunes, saves an ordinary checkpoint in the dense model's dtype, and prints seconds.
PEER = """
import sys, time
from importlib.metadata import version
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

folder, tokens, out, method, target = sys.argv[1:]
dtype = AutoConfig.from_pretrained(folder).dtype
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
windows = load_file(tokens)["input_ids"]
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
structured = ":" in target
kept, of = map(int, target.split(":")) if structured else (0, 0)
modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method](
    sparsity=1 - kept / of if structured else float(target),
    mask_structure=f"{of - kept}:{of}" if structured else "0:0",
    targets=["Linear"], ignore=["re:.*lm_head"],
)
began = time.perf_counter()
oneshot(model=model, dataset=DataLoader(rows, batch_size=1), recipe=[modifier], num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1], pipeline="sequential")
seconds = time.perf_counter() - began
model.to(dtype).save_pretrained(out, save_compressed=False)
print("RESULT", seconds, version("llmcompressor"), version("transformers"))
"""


def prune(python: Path, model: str, tokens: Path, out: Path, method: str, target: str) -> dict[str, Any]:
    """Prune into `out`; return seconds and versions."""
    command = [str(python), "-c", PEER, model, str(tokens), str(out), method, target]
    (line,) = [line for line in call(command).splitlines() if line.startswith("RESULT")]
    _, seconds, llm_compressor, transformers = line.split()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(model) / name, out / name)
    return {"seconds": float(seconds), "llm-compressor": llm_compressor, "transformers": transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with llm-compressor")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("--name", default=DEFAULT_NAME, help="of the results")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=300, help="examples of each task; 0: no tasks")
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--targets", default=",".join(TARGETS))
    options = parser.parse_args()
    model = model_folder(options.model)
    kept = ROOT / "benchmarks" / "results" / options.name / "llm-compressor.json"
    results = json.loads(kept.read_text()) if kept.exists() else []
    with ConsoleProgress() as progress, tempfile.TemporaryDirectory() as work:
        tasks = (
            {"tasks": TASKS, "tasks_folder": options.data / "tasks", "limit": options.limit} if options.limit else {}
        )
        evaluation = EvaluateConfig(
            model=model, text=(str(options.data / TEST),), windows=options.windows, seqlen=1024, against=model, **tasks
        )
        evaluator: Evaluator | None = None
        calibration = load_calibration(
            str(options.data / CALIBRATION), partial(load_tokenizer, Path(model)), options.samples, options.seqlen, 0
        )
        tokens = Path(work) / "tokens.safetensors"
        save_file({"input_ids": calibration.input_ids}, tokens)
        for target in options.targets.split(","):
            for method in options.methods.split(","):
                row = {"method": method, "target": target, "samples": options.samples, "seqlen": options.seqlen}
                row |= {"windows": options.windows, "calibration": calibration.digest}
                limit = options.limit if target in TASK_TARGETS else 0
                alike = [result for result in results if row.items() <= result.items()]
                if any(not limit or result.get("limit") == limit for result in alike):
                    continue
                progress.stage(f"{method} {target}")
                out = Path(work) / "out"
                pruning = prune(options.python, model, tokens, out, method, target)
                evaluator = evaluator or Evaluator(evaluation, progress)
                measured = evaluator.measure(str(out), progress, with_tasks=bool(limit))
                (text,) = measured.texts
                shutil.rmtree(out)
                results = [result for result in results if result not in alike]
                results.append(
                    row | pruning | {
                        "perplexity": text.perplexity, "divergence": text.against.divergence, "limit": limit,
                        "tasks": {score.task: score.value for score in measured.tasks if score.metric == ACCURACY},
                        "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "machine": machine(),
                    }
                )  # fmt: skip
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        [result["target"], result["method"], f"{result['samples']} × {result['seqlen']}", f"{result['perplexity']:.2f}",
         f"{result['divergence']:.3f}", f"{result['seconds']:.0f}"]
        for result in sorted(results, key=lambda result: (result["samples"], TARGETS.index(result["target"])))
    ]  # fmt: skip
    show(f"llm-compressor, {options.name}", ["target", "method", "tokens", "perplexity", "KL", "seconds"], rows)


if __name__ == "__main__":
    main()
