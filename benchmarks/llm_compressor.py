"""SparseGPT of llm-compressor on the same tokens as ours: an outside baseline, in an environment of its own.

    pip install llmcompressor        # asks for other versions of transformers than this program
    python benchmarks/llm_compressor.py MODEL TOKENS OUT --sparsity 0.5 | --pattern 2:4
    llm-barber evaluate OUT --text wikitext2      # in this program's environment

TOKENS is a safetensors file with input_ids, as `compare` and `quality.py` leave them (calibration-seed0-….safetensors).
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="0:0", help="N:M; 0:0 is llm-compressor's word for unstructured")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    ids = load_file(options.tokens)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    recipe = SparseGPTModifier(
        sparsity=0.5 if options.pattern != "0:0" else options.sparsity,
        mask_structure=options.pattern,
        targets=["Linear"],
        ignore=["lm_head"],
    )
    began = time.monotonic()
    oneshot(
        model=model,
        dataset=data,
        processor=AutoTokenizer.from_pretrained(options.model),  # asked for, not used: the tokens are there
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.monotonic() - began
    model.save_pretrained(options.out, save_compressed=False)
    for path in options.model.iterdir():
        if path.name.startswith(("tokenizer", "special", "vocab", "merges", "chat")):
            shutil.copy(path, options.out)
    weights = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    print(f"{options.out}: {zeros:.2%} zeros, {seconds:.0f} s, {options.dtype}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
