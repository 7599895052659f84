"""Measure llm-compressor's SparseGPT and Wanda on our calibration tokens and texts.

llm-compressor pins other versions of transformers: give it an environment of its own.

    python3 -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/llm_compressor.py --python PEER/bin/python --data DATA [--samples 64 --seqlen 1024 --windows 32]

DATA is that of `quality.py`. llm-compressor computes in float32. It prints perplexity, divergence and seconds of each
row, and adds the row to `benchmarks/results/NAME/llm-compressor.json`.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import call, machine, model_folder, show
from safetensors.torch import save_file

from llm_barber import EvaluateConfig, evaluate
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.text.calibration import load_calibration

RESULTS = Path(__file__).parent / "results"
CALIBRATION, TEST = "text/c4-sample.txt", "text/wikitext2-raw-test.txt"
TASKS = "arc_easy,hellaswag"
WITH_TASKS = ("0.5", "2:4")

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


def main() -> None:
    """Measure each method at each target and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with llm-compressor")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    parser.add_argument("--name", default="smollm2-135m", help="of the results")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=300, help="examples of each task; 0: no tasks")
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--targets", default="0.5,0.6,0.7,2:4,4:8")
    options = parser.parse_args()
    kept = RESULTS / options.name / "llm-compressor.json"
    results: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    for target in options.targets.split(","):
        for method in options.methods.split(","):
            results.append(measure(model_folder(options.model), method, target, options))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        [row["target"], row["method"], f"{row['samples']} × {row['seqlen']}", f"{row['perplexity']:.2f}",
         f"{row['divergence']:.3f}", f"{row['seconds']:.0f}"]
        for row in results
    ]  # fmt: skip
    show(f"llm-compressor, {options.name}", ["target", "method", "tokens", "perplexity", "KL", "seconds"], rows)


def measure(model: str, method: str, target: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune by llm-compressor in its own process, and evaluate the checkpoint here."""
    limit = options.limit if target in WITH_TASKS else 0
    tasks = {"tasks": TASKS, "tasks_folder": options.data / "tasks", "limit": limit} if limit else {}
    text = str(options.data / CALIBRATION)
    with tempfile.TemporaryDirectory() as work:
        tokens, out = Path(work) / "tokens.safetensors", Path(work) / "out"
        calibration = load_calibration(text, lambda: load_tokenizer(Path(model)), options.samples, options.seqlen, 0)
        save_file({"input_ids": calibration.input_ids}, tokens)
        printed = call([str(options.python), "-c", PEER, model, str(tokens), str(out), method, target])
        (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
        _, seconds, llm_compressor, transformers = line.split()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(model) / name, out / name)
        measured = evaluate(
            EvaluateConfig(
                model=str(out), text=(str(options.data / TEST),), windows=options.windows, seqlen=1024, against=model,
                **tasks,
            )
        )  # fmt: skip
    (score,) = measured.texts
    return {
        "method": method, "target": target, "samples": options.samples, "seqlen": options.seqlen,
        "windows": options.windows, "calibration": calibration.digest, "seconds": float(seconds),
        "llm-compressor": llm_compressor, "transformers": transformers, "perplexity": score.perplexity,
        "divergence": score.against.divergence, "limit": limit,
        "tasks": {task.task: task.value for task in measured.tasks if task.metric == "acc"},
        "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "machine": machine(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
