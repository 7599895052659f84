"""One model of the demonstration: it is pruned, measured, and continues a prompt."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from llm_barber.checkpoint.hub import resolve_model
from llm_barber.errors import ModelError
from llm_barber.evaluation.perplexity import perplexity
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.prune import PruneConfig
from llm_barber.usage import reset_peak_memory

# Tokens of texts, in the demonstration's folder: calibration, its first window alone, and held-out text.
CALIBRATION, ONE_WINDOW, TEST = "calibration.safetensors", "one-window.safetensors", "test.safetensors"
TOKENS = "input_ids"
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
    sparsity: float = 0.0
    seconds: float | None = None
    peak_memory: int | None = None
    sentence: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoMethod:
    """A method of the demonstration.

    `description`: what it does, for people. `settings`: of `prune`; None: the dense model stays as it is.
    `calibration`: file of its text.
    """

    description: str
    settings: Mapping[str, Any] | None
    calibration: str = CALIBRATION


@dataclass(frozen=True)
class RowTask:
    """A row to make: its name, the model that is pruned, the method, and the demonstration's settings."""

    name: str
    source: str
    method: DemoMethod
    config: DemoConfig


@dataclass(frozen=True)
class RowOutcome:
    """A row, the seconds that its perplexity took, and the warnings of its run."""

    row: DemoRow
    seconds: float
    warnings: tuple[str, ...]


class _Warnings(Silent):
    """Progress that keeps warnings for another process to show."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def make_row(task: RowTask, progress: Progress | None = None) -> RowOutcome:
    """Prune a model and measure it.

    Args:
        task: the row to make.
        progress: told of each stage; None: this is a process of its own, which shows nothing, and warnings are in the
            outcome.

    Raises:
        BarberError: the run cannot be done.
    """
    warnings = _Warnings()
    shown = progress or warnings
    if progress is None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    pruned: dict[str, Any] = {"folder": task.source}
    if task.method.settings is not None:
        shown.stage(f"{task.name}: pruning to 50 %")
        pruned = _prune(_settings(task), shown)
    measured, seconds = _measure(task, pruned["folder"], shown)
    row = DemoRow(name=task.name, description=task.method.description, **pruned, **measured)
    return RowOutcome(row, seconds, tuple(warnings.messages))


def _settings(task: RowTask) -> dict[str, Any]:
    """The settings of `prune` for a method, as many as the command line needs to do the same."""
    folder, device = task.config.output, task.config.device
    return {
        "model": task.source,
        "output": folder / task.name,
        **(task.method.settings or {}),
        "calibration": folder / task.method.calibration,
        "overwrite": True,
        **({} if device == "auto" else {"device": device}),
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


def _measure(task: RowTask, folder: str, progress: Progress) -> tuple[dict[str, Any], float]:
    """Measure the perplexity of a checkpoint, and let it continue the prompt.

    Returns what a row says of both, and the seconds that the perplexity took.
    """
    device = resolve_device(task.config.device)
    checkpoint = resolve_model(folder)
    loader = auto_class(AutoConfig.from_pretrained(checkpoint))
    model = loader.from_pretrained(checkpoint, dtype=resolve_dtype("auto", device)).to(device)
    model.eval()
    windows = load_file(task.config.output / TEST)[TOKENS]
    began = time.perf_counter()
    value = perplexity(model, windows, progress)
    seconds = time.perf_counter() - began
    tokenizer = demo_tokenizer(task.source)
    prompt = tokenizer(task.config.prompt, return_tensors="pt").to(device)
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


def demo_tokenizer(model: str) -> Any:
    """The tokenizer of the model that is pruned.

    Raises:
        ModelError: the model has none.
    """
    tokenizer = load_tokenizer(resolve_model(model))
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", "the demonstration needs one: choose another model")
    return tokenizer
