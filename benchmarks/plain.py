"""Compare `prune --preset paper` with the same method written plainly: time, memory and masks.

Plain is `examples/barber.py`: the model in memory, a window at a time, autograd's gradients, a loop over rows, in
float32. `prune` runs in float32 and in bfloat16. Each has a process of its own; loading is included.

    python benchmarks/plain.py
    OMP_NUM_THREADS=1 python benchmarks/plain.py --samples 16
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import call, keep, model_folder, show
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import PruneConfig, prune
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.text.calibration import load_calibration

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import barber

SIDES = ("plain", "float32", "bfloat16")


def masks_of(side: str, model: str, folder: Path) -> dict[str, Tensor]:
    """Keep masks by the name of the linear, found by one side."""
    tokens = folder / "tokens.safetensors"
    if side == "plain":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        return barber.prune(loaded, load_file(tokens)["input_ids"])
    prune(
        PruneConfig(
            model=model, output=folder / "out", preset="paper", calibration=tokens, dtype=side, report=False,
            overwrite=True,
        )
    )  # fmt: skip
    weights = {
        name: tensor for path in (folder / "out").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    return {name.removesuffix(".weight"): weight != 0 for name, weight in weights.items() if "_proj.weight" in name}


def measure(side: str, model: str, folder: Path) -> None:
    """Print seconds and peak memory of a side as JSON, and leave its masks in the folder."""
    began = time.perf_counter()
    masks = masks_of(side, model, folder)
    seconds = time.perf_counter() - began
    save_file(masks, folder / f"{side}.safetensors")
    print(json.dumps({"seconds": seconds, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main() -> None:
    """Measure all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaMA-shaped folder or hub id; default: SmolLM2-135M from its package")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = model_folder(options.model)
    if options.only:
        measure(options.only, model, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = load_calibration("builtin", lambda: load_tokenizer(Path(model)), options.samples, options.seqlen, 0)
        save_file({"input_ids": text.input_ids}, Path(folder) / "tokens.safetensors")
        arguments = [sys.executable, __file__, "--model", model, "--folder", folder, "--only"]
        results = {side: json.loads(call([*arguments, side]).splitlines()[-1]) for side in SIDES}
        masks = {side: load_file(Path(folder) / f"{side}.safetensors") for side in SIDES}
    rows = []
    for side, result in results.items():
        same = sum(int((mask == masks["plain"][name]).sum()) for name, mask in masks[side].items())
        alike = same / sum(mask.numel() for mask in masks[side].values())
        faster = results["plain"]["seconds"] / result["seconds"]
        rows.append([side, f"{result['seconds']:.2f}", f"{result['GiB']:.2f}", f"{faster:.2f}", f"{alike:.4%}"])
    title = f"Wanda, rebuilt, {Path(model).name}, {options.samples} × {options.seqlen} tokens, loading included"
    keep("plain", {"title": title, "rows": rows})
    show(title, ["", "seconds", "peak GiB", "times as fast", "mask bits as plain's"], rows)


if __name__ == "__main__":
    main()
