"""The models of the payoff benchmark: checkpoints, pruned and packed, and how each side is loaded and run."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import call
from safetensors.torch import save_file
from synthetic import write_llama
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from llm_barber import PackConfig, PruneConfig, load, pack, prune
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.tools.demo import demo_model

RANDOM = "llama-7b-4-layers"
SMOLLM = "smollm2-135m"
DENSE = "dense"
INT8 = "int8"  # kept values are rounded
# What `load` is given for each kind of side.
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"keep_packed": True},
    "auto": {"keep_packed": "auto"},
    INT8: {"keep_packed": True},
}
PROMPT = list(range(100, 108))
LOADER = Path(__file__).parent / "payoff_load.py"


logging.disable_progress_bar()


@dataclass(frozen=True)
class Side:
    """A checkpoint and how it is loaded: `kind` is `DENSE` or of `KINDS`."""

    kind: str
    folder: Path
    target: str = ""

    @property
    def name(self) -> str:
        """Name in the cells."""
        return f"{self.kind} {self.target}".strip()

    def load(self, dtype: str) -> PreTrainedModel:
        """Load the model for inference."""
        if self.kind != DENSE:
            return load(self.folder, dtype=getattr(torch, dtype), **KINDS[self.kind])
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype))
        return loaded.eval()

    def loading(self, dtype: str, repeats: int) -> dict[str, float]:
        """Seconds and bytes of loading in a process of its own, the least of several; bytes of the weight files."""
        loads = [
            json.loads(call([sys.executable, str(LOADER), self.kind, str(self.folder), dtype]).splitlines()[-1])
            for _ in range(repeats)
        ]
        return {
            "seconds": min(loaded["seconds"] for loaded in loads),
            "memory": min(loaded["memory"] for loaded in loads),
            "disk": sum(path.stat().st_size for path in self.folder.glob("*.safetensors")),
        }


@dataclass(frozen=True)
class Source:
    """A model by name: the folder of its checkpoint, and its GGUF file if it has one."""

    name: str
    folder: Path
    gguf: Path | None


def sources(named: list[str], work: Path, without_random: bool) -> list[Source]:
    """The models: SmolLM2 from its package, NAME=SOURCE (folder, hub id or GGUF file), and random layers of 7B."""
    pairs = [(SMOLLM, str(demo_model())), *(text.partition("=")[::2] for text in named)]
    models = [
        Source(name, resolve_model(source), Path(source) if source.endswith(".gguf") else None)
        for name, source in pairs
    ]
    return models if without_random else [*models, random_model(work)]


def random_model(work: Path) -> Source:
    """Four layers of LLaMA-2-7B's shape with random weights, and tokens to prune them with."""
    folder = work / RANDOM
    if not (folder / "model.safetensors.index.json").exists():  # it is written last
        print(f"{RANDOM}: writing random weights …", flush=True)
        torch.manual_seed(0)
        write_llama(folder, 4, 4096, 11008, 32, 32000, torch.bfloat16)
    return Source(RANDOM, folder, None)


def pruned(source: Source, target: str, work: Path) -> Path:
    """Folder of the model pruned by magnitude, made unless it is there."""
    output = work / f"{source.name}-{target.replace(':', 'of')}"
    if not output.exists():  # an unfinished one has another name
        print(f"{output.name}: pruning …", flush=True)
        settings: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
        if not (source.folder / "tokenizer.json").exists():
            tokens = work / "tokens.safetensors"
            vocabulary = AutoConfig.from_pretrained(source.folder).vocab_size
            save_file({"input_ids": torch.arange(2 * 128).view(2, 128) % vocabulary}, tokens)
            settings["calibration"] = str(tokens)
        prune(
            PruneConfig(
                model=str(source.folder), output=output, initial="magnitude", rebuild=False, samples=2, seqlen=128,
                report=False, resume=True, **settings,
            )
        )  # fmt: skip
    return output


def packed(source: Source, target: str, kind: str, work: Path) -> Path:
    """Folder of the model pruned and packed as a kind of side needs it, made unless it is there."""
    folder = pruned(source, target, work)
    output = folder.with_name(f"{folder.name}-{INT8 if kind == INT8 else 'packed'}")
    if not output.exists():
        print(f"{output.name}: packing …", flush=True)
        pack(PackConfig(model=str(folder), output=output, overwrite=True, values="int8" if kind == INT8 else "exact"))
    return output


def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    """Greedy decoding of one sequence from a prompt of 8 tokens."""
    prompt = torch.tensor(PROMPT)[None]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def prefill(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    """One forward pass over a prompt."""
    prompt = torch.arange(100, 100 + tokens)[None]
    return lambda: model(prompt, logits_to_keep=1, use_cache=False)
