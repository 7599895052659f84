"""Measure what packed models gain: bytes, loading, speed, memory and quality, against dense and llama.cpp. Resumable.

    python benchmarks/payoff.py --text wikitext2                         # SmolLM2-135M, pruned by magnitude
    python benchmarks/payoff.py --model gemma.gguf --llama LLAMA/bin/python --text wikitext2
    python benchmarks/payoff.py --preset best --samples 64 --seqlen 1024 --calibration c4-sample.txt --text wikitext2

Speed and bytes do not depend on which weights are pruned, quality does: `--preset` prunes well, and takes longer.
Models are kept in --work. Speeds are those of `llm-barber generate --against`, both models in turn.

llama.cpp is measured if --llama names a Python that has it, and the model is a GGUF file:

    python3 -m venv LLAMA
    CMAKE_ARGS=-DLLAVA_BUILD=OFF LLAMA/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import call, keep, model_folder, show
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_barber import EvaluateConfig, PackConfig, PruneConfig, evaluate, load, pack, prune
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.text.calibration import read_text
from llm_barber.tools.demo import demo_model

KINDS: dict[str, Any] = {"packed": True, "auto": "auto", "int8": True}  # what `load` is given
LLAMA_TYPES = ("BF16", "Q8_0", "Q4_K_M")
WORKER = Path(__file__).parent / "payoff_llama.py"
LOADS = 3  # the fastest counts
HEADINGS = [
    "", "threads", "disk MB", "load s", "memory MB", "decode, tokens/s", "of dense", "prefill", "of dense",
    "perplexity", "KL",
]  # fmt: skip


def main() -> None:
    """Measure each side of a model with each number of threads, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, hub id or GGUF file (default: SmolLM2-135M from its package)")
    parser.add_argument("--targets", default="0.5,0.7,2:4", help="sparsities and N:M patterns")
    parser.add_argument("--kinds", default=",".join(KINDS), help="how packed models are loaded")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--prompt", type=int, default=256, help="about as many tokens of prompt")
    parser.add_argument("--preset", help="prune by this preset (default: by magnitude)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", help="held-out text for perplexity and KL")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens of it")
    parser.add_argument("--work", type=Path, default=Path("build/payoff"), help="folder for pruned and packed models")
    parser.add_argument("--llama", metavar="PYTHON", help="the Python that has llama-cpp-python")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or str(demo_model())
    dense = Path(model_folder(model))
    rows = [["dense PyTorch", "", megabytes(disk(dense)), f"{load_seconds(dense, None):.1f}", *[""] * 7]]
    for target in options.targets.split(","):
        for kind in options.kinds.split(","):
            rows += packed_rows(dense, target, kind, options)
    if options.llama and model.endswith(".gguf"):
        for kind in LLAMA_TYPES:
            rows += llama_rows(Path(model), dense, kind, options)
    title = f"{dense.name}, {options.tokens} new tokens, pruned by {options.preset or 'magnitude'}"
    keep("payoff", {"title": title, "rows": rows})
    show(title, HEADINGS, rows)


def packed_rows(dense: Path, target: str, kind: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of a model that is pruned, packed, and loaded as `kind` says; one for each number of threads."""
    folder = packed(dense, target, kind, options)
    quality = ["", ""]
    if options.text:
        (text,) = evaluate(
            EvaluateConfig(
                model=str(folder), against=str(dense), text=(options.text,), windows=options.windows, seqlen=1024
            )
        ).texts
        quality = [f"{text.perplexity:.2f}", f"{text.against.divergence:.3f}" if text.against else ""]
    start = [f"{target} {kind}", megabytes(disk(folder)), f"{load_seconds(folder, KINDS[kind]):.1f}"]
    rows = []
    for threads in options.threads.split(","):
        command = [
            sys.executable, "-m", "llm_barber", "generate", str(folder), prompt_text(dense, options.prompt),
            "--against", str(dense), "--keep-packed", "auto" if kind == "auto" else "yes", "--no-chat", "--json",
            "--quiet", "--max-new-tokens", str(options.tokens + 1),
        ]  # fmt: skip
        result = json.loads(call(command, {**os.environ, "OMP_NUM_THREADS": threads}))
        side, other = result["generated"], result["against"]
        speeds = [column for part in ("decode", "prefill") for column in speed(side[part], other[part])]
        rows.append([start[0], threads, *start[1:], megabytes(side["peak_memory"]), *speeds, *quality])
    return rows


def packed(dense: Path, target: str, kind: str, options: argparse.Namespace) -> Path:
    """Folder of the pruned and packed model, made unless it is there."""
    pruned = options.work / f"{dense.name}-{options.preset or 'magnitude'}-{target.replace(':', 'of')}"
    output = pruned.with_name(f"{pruned.name}-{'int8' if kind == 'int8' else 'packed'}")
    if output.exists():
        return output
    settings: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    settings |= {"preset": options.preset} if options.preset else {"initial": "magnitude", "rebuild": False}
    prune(
        PruneConfig(
            model=str(dense), output=pruned, samples=options.samples, seqlen=options.seqlen,
            calibration=options.calibration, report=False, resume=True, **settings,
        )
    )  # fmt: skip
    pack(PackConfig(model=str(pruned), output=output, values="int8" if kind == "int8" else "exact"))
    return output


def load_seconds(folder: Path, keep_packed: Any) -> float:
    """Seconds of loading, the fastest of several; None: the dense model, by transformers."""
    seconds = []
    for _ in range(LOADS):
        began = time.perf_counter()
        if keep_packed is None:
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            load(folder, keep_packed=keep_packed)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def prompt_text(dense: Path, tokens: int) -> str:
    """The beginning of the builtin text, of so many tokens of the model."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    return str(tokenizer.decode(tokenizer(read_text("builtin", 20 * tokens)).input_ids[:tokens]))


def speed(side: dict[str, Any] | None, dense: dict[str, Any] | None) -> list[str]:
    """Tokens a second of the fastest round, and the ratio to the dense model's."""
    if side is None or dense is None:
        return ["", ""]
    rate, of_dense = (part["tokens"] / min(part["seconds"]) for part in (side, dense))
    return [f"{rate:,.1f}", f"{rate / of_dense:.2f}"]


def llama_rows(source: Path, dense: Path, kind: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the dense model in a type of llama.cpp; one for each number of threads."""
    path = options.work / f"{source.stem}.{kind}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        llama(options.llama, source=str(source), target=str(partial), kind=kind)
        partial.rename(path)
    prompt = AutoTokenizer.from_pretrained(dense)(prompt_text(dense, options.prompt)).input_ids
    quality = llama_quality(path, dense, options) if options.text else ["", ""]
    rows = []
    for threads in options.threads.split(","):
        result = llama(options.llama, path=str(path), threads=int(threads), prompt=prompt, tokens=options.tokens)
        rates = [f"{result['decode']:,.1f}", "", f"{result['prefill']:,.1f}", ""]
        size = megabytes(path.stat().st_size)
        rows.append([f"llama.cpp {kind}", threads, size, f"{result['load']:.1f}", "", *rates, *quality])
    return rows


def llama_quality(path: Path, dense: Path, options: argparse.Namespace) -> list[str]:
    """Perplexity, and KL from the dense model in bfloat16, on the windows of `evaluate`."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = evaluation_windows(options.text, evaluation_text(options.text), tokenizer, 1024, options.windows)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    scratch, loss, divergence = options.work / "logits.npy", 0.0, 0.0
    for window in windows:
        llama(options.llama, path=str(path), threads=os.cpu_count(), prompt=window.tolist(), logits=str(scratch))
        with torch.inference_mode():
            expected = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        logs = torch.from_numpy(np.load(scratch))[:-1].log_softmax(-1)
        loss -= logs.gather(1, window[1:, None]).mean().item() / len(windows)
        divergence += (expected.exp() * (expected - logs)).sum(-1).mean().item() / len(windows)
    return [f"{math.exp(loss):.2f}", f"{divergence:.3f}"]


def llama(python: str, **request: Any) -> dict[str, Any]:
    """Let llama.cpp carry out a request of `payoff_llama.py`."""
    done = subprocess.run([python, str(WORKER)], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def disk(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def megabytes(size: int | None) -> str:
    """Bytes as megabytes."""
    return "" if size is None else f"{size / 1e6:,.0f}"


if __name__ == "__main__":
    main()
