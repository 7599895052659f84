"""Compare masks and perplexity of pruning in float32 and in bfloat16, on the same calibration text.

    python benchmarks/compute_dtype.py

It prints, for each method, the share of mask bits that differ, both perplexities, and the seconds.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import model_folder, show
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_barber import PruneConfig, prune
from llm_barber.evaluation.perplexity import perplexity
from llm_barber.evaluation.texts import evaluation_windows
from llm_barber.text.calibration import read_text

METHODS = {
    "magnitude, rebuilt (block, 0.1)": {"initial": "magnitude"},
    "wanda": {"initial": "wanda", "rebuild": False},
    "wanda, rebuilt (output, 0.1)": {"initial": "wanda", "rebuild_ratio": 0.1},
    "sparsegpt": {"initial": "sparsegpt", "rebuild": False},
}


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """Masks of the linears: True where a weight is not zero."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: weight != 0 for name, weight in load_file(file).items() if "proj" in name}
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: SmolLM2-135M from its package")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    model = model_folder(options.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = evaluation_windows("builtin-test", read_text("builtin-test"), tokenizer, options.seqlen, options.windows)

    def measured(folder: Path | str) -> float:
        return perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), windows)

    rows = [["dense", "–", f"{measured(model):.2f}", "–", "–"]]
    for name, settings in METHODS.items():
        masks_by_dtype, values, seconds = [], [], []
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "out"
                report = prune(
                    PruneConfig(
                        model=model,
                        output=output,
                        samples=options.samples,
                        seqlen=options.seqlen,
                        dtype=dtype,
                        **settings,
                    )
                )
                masks_by_dtype.append(masks(output))
                values.append(measured(output))
                seconds.append(report.seconds["total"])
        first, second = masks_by_dtype
        differing = sum(int((mask != second[name]).sum()) for name, mask in first.items())
        total = sum(mask.numel() for mask in first.values())
        rows.append(
            [
                name,
                f"{differing / total:.3%}",
                f"{values[0]:.2f}",
                f"{values[1]:.2f}",
                f"{seconds[0]:.0f} / {seconds[1]:.0f}",
            ]
        )
    show(
        f"50 %, {Path(model).name}, {options.samples} × {options.seqlen} builtin tokens, perplexity on "
        f"{options.windows} × {options.seqlen} tokens of WikiText-2 test, evaluated in bfloat16",
        [
            "method",
            "mask bits that differ",
            "perplexity, float32",
            "perplexity, bfloat16",
            "seconds, float32 / bfloat16",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
