"""Runs that are timed, stage by stage, beside what `plan` forecasts for them on this machine."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llm_barber.errors import ModelError
from llm_barber.planning.configuration import read_configuration
from llm_barber.planning.forecast import ProcessesForecast
from llm_barber.planning.plan import plan
from llm_barber.progress import Progress
from llm_barber.record.report import RunReport
from llm_barber.run.commands import prune
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig
from llm_barber.tools.demo import demo_model
from llm_barber.tools.selftest.bench import TIMED, Bench, Size
from llm_barber.tools.selftest.result import Finding, StageTime, TimedRun

# Runs that are timed: their settings of `prune`.
TIMED_RUNS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "mask": {"preset": "mask", "tune_passes": 2, "tune_windows": 4},
}
# Stages of a run's record, and those of a plan that happen in each.
STAGES: Mapping[str, tuple[str, ...]] = {
    "embed": ("embed",),
    "reorder": ("reorder",),
    "allocate": ("allocate",),
    "layers": ("initial", "rebuild", "refine", "tune", "propagate", "head"),
    "read": ("read",),
    "write": ("write", "keep"),
}


def timed_model(bench: Bench, model: str | None) -> tuple[str, str]:
    """Choose the model whose runs are timed: the model, and its name in the report.

    A path of the user's is not shown.
    """
    if model is not None:
        return model, "the given model"
    if not bench.on_gpu:
        return str(bench.model()), "a random model"
    try:
        return str(demo_model()), "SmolLM2-135M"
    except ModelError:  # its package is not installed
        return str(bench.model(size=TIMED)), "a random model of SmolLM2-135M's shape"


def fitting_size(model: str, size: Size) -> Size:
    """Windows for a model: its vocabulary, and no more tokens than it has positions."""
    config = read_configuration(model, None).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or size.tokens
    return replace(size, vocabulary=config.vocab_size, tokens=min(size.tokens, positions))


def time_runs(bench: Bench, model: str | None, progress: Progress) -> Iterator[tuple[Finding, TimedRun]]:
    """Plan and make each run; a run that ends is a check that has passed, whatever its time."""
    source, name = timed_model(bench, model)
    windows = bench.windows(size=fitting_size(source, TIMED if bench.on_gpu else bench.size))
    for preset, settings in TIMED_RUNS.items():
        compute = {"device": str(bench.device), "dtype": bench.dtype_name}
        common: dict[str, Any] = {**settings, **compute, "model": source, "calibration": str(windows)}
        forecast = plan(PlanConfig(**common), progress)
        config = PruneConfig(output=bench.folder / f"timed-{preset}", report=False, **common)
        report = prune(config, progress)
        run = compare_times(f"{preset}, {name}, {forecast.settings}", forecast.runs[0], report)
        planned, taken = forecast.runs[0].seconds, report.seconds["total"]
        yield Finding(text=f"{preset}: planned {planned:.1f} s, took {taken:.1f} s", passed=True), run


def compare_times(title: str, forecast: ProcessesForecast, report: RunReport) -> TimedRun:
    """A run's stages beside its plan's, those that take time in either, and their total."""
    planned = {stage.name: stage.seconds for stage in forecast.stages}
    stages = [
        StageTime(stage=stage, planned=sum(planned.get(name, 0.0) for name in names), taken=report.seconds[stage])
        for stage, names in STAGES.items()
    ]
    total = StageTime(stage="total", planned=forecast.seconds, taken=report.seconds["total"])
    return TimedRun(
        run=title,
        stages=(*(stage for stage in stages if stage.planned or stage.taken), total),
        planned_memory=forecast.device_memory,
        peak_memory=report.peak_device_memory,
    )
