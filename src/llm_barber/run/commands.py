"""The commands `prune` and `rebuild`: each opens and checks a run, and hands it to `stream.py`."""

from collections.abc import Callable
from typing import Any

from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.hub import local_path, warn_of_revision
from llm_barber.checkpoint.output import clear_finished
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.errors import SettingsError
from llm_barber.loading.job import Job
from llm_barber.loading.preparing import open_job
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.method.checkpoint_masks import CheckpointMasks
from llm_barber.method.method_masks import MethodMasks
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.model.device import current_gpu_kept
from llm_barber.parallel.ranks import Ranks, joined
from llm_barber.progress import Progress, Silent
from llm_barber.record.report import RunReport
from llm_barber.run.finished import finished_run, tell_of_finished
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.stream import run
from llm_barber.settings.base import takes
from llm_barber.settings.presets import Initial, rebuild_defaults
from llm_barber.settings.prune import PruneConfig, RebuildConfig, RunSettings
from llm_barber.settings.targets import Targets


@takes(PruneConfig)
def prune(config: PruneConfig, progress: Progress | None = None) -> RunReport:
    """Prune a dense model, and rebuild or tune its masks; writes `config.output`.

    Raises:
        BarberError: whatever is wrong with settings, model, calibration text or output. Layers that were
            finished stay in `OUT.partial`, for `resume`, but not after NaN or Inf.
    """
    progress = progress or Silent()
    with current_gpu_kept(), joined() as ranks:
        return _finished_before(config, progress, ranks) or _prune(config, progress, ranks)


def prepare_prune(config: PruneConfig, progress: Progress, ranks: Ranks) -> PreparedRun:
    """Open and check a run of `prune`.

    Raises:
        BarberError: as `prune`.
    """
    job = open_job(config.model, config, config.targets, progress, ranks)
    if (job.source.folder / RECORD_NAME).is_file():
        progress.warn(
            f"{config.model} was pruned before: its zeros are ranked as weights; give the dense model, or call rebuild "
            "to choose a pruned model's masks anew"
        )
    rebuild_settings = _rebuild_settings(config, config.method, config.target)
    initial_masks = MethodMasks(job, config.method, config.targets, config.initial_granularity, config.keep_updates)
    prepared = PreparedRun(config.model, config, job, initial_masks, rebuild_settings, config.method, config.method)
    if config.reorder and not prepared.reorders:
        raise SettingsError(
            "--reorder: no channels that a linear with N:M reads may change places in this model",
            "leave --reorder out: the family has none (docs/reference/families.md), the linears that read them are "
            "not pruned to N:M, or M divides neither a row nor a head",
        )
    return prepared


def _prune(config: PruneConfig, progress: Progress, ranks: Ranks) -> RunReport:
    prepared = prepare_prune(config, progress, ranks)
    report = run(prepared, progress)
    target = _target_sparsity(report, config.targets, prepared.job)
    if abs(report.sparsity - target) > 0.01 * target:
        progress.warn(
            f"sparsity is {report.sparsity:.4g}, not {target:.4g}: comparison groups of this size cannot be split "
            "finer, or the method prunes another number of weights"
        )
    return report


def _rebuild_settings(config: RunSettings, method: Initial, pattern: Pattern | None) -> RebuildSettings | None:
    """Settings of the rebuild; None: no rebuild.

    By default, linears with N:M compete within rows, as in the released program.
    """
    if not config.rebuilds:
        return None
    granularity, ratio = rebuild_defaults(method, config.granularity, config.rebuild_ratio, pattern)
    return RebuildSettings(granularity, ratio, None if config.granularity else Granularity.OUTPUT)


def _target_sparsity(report: RunReport, targets: Targets, job: Job) -> float:
    """Sparsity that the targets ask for, over all linears; linears that are not pruned count."""
    pruned = 0.0
    for layer in report.layers:
        for linear in layer.linears:
            target = targets.of(layer.index, job.linear_name(layer.index, linear.name), job.layer_count)
            rows, columns = linear.shape
            columns = target.covered(columns) if isinstance(target, NofM) else columns
            pruned += target.sparsity * rows * columns if target else 0
    return pruned / report.weights


@takes(RebuildConfig)
def rebuild(config: RebuildConfig, progress: Progress | None = None) -> RunReport:
    """Rebuild the mask of a pruned model with its dense one; writes `config.output`.

    Raises:
        BarberError: whatever is wrong with settings, models, calibration text or output. Layers that were
            finished stay in `OUT.partial`, for `resume`, but not after NaN or Inf.
    """
    progress = progress or Silent()
    with current_gpu_kept(), joined() as ranks:
        return _finished_before(config, progress, ranks) or run(prepare_rebuild(config, progress, ranks), progress)


def prepare_rebuild(config: RebuildConfig, progress: Progress, ranks: Ranks) -> PreparedRun:
    """Open and check a run of `rebuild`.

    Raises:
        BarberError: as `rebuild`.
    """
    local_path(config.pruned)  # a wrong path is refused before the dense model is downloaded
    warn_of_revision("pruned_revision", config.pruned_revision, config.pruned, progress)
    job = open_job(config.dense, config, None, progress, ranks)
    initial_masks = CheckpointMasks(job, config.pruned, config.pattern, config.pruned_revision)
    if initial_masks.head_was_pruned:
        progress.warn(f"the output head of {config.pruned} was pruned: OUT gets the head of {config.dense}")
    method = config.initial or initial_masks.recorded_method
    settings = _rebuild_settings(config, method, initial_masks.pattern)
    return PreparedRun(config.dense, config, job, initial_masks, settings, method, f"mask of {config.pruned}")


# How each command opens and checks a run, by `RunSettings.command`.
PREPARE: dict[str, Callable[[Any, Progress, Ranks], PreparedRun]] = {
    "prune": prepare_prune,
    "rebuild": prepare_rebuild,
}


def _finished_before(config: RunSettings, progress: Progress, ranks: Ranks) -> RunReport | None:
    """Report of this same run if it resumes and is finished already; otherwise None.

    A job that is queued again is such a run.
    """
    report = ranks.from_first(finished_run(config, progress) if ranks.is_first else None)
    if report is not None:
        if ranks.is_first and (config.output / STATE_NAME).is_file():  # the run was killed when its output was whole
            clear_finished(config.output)
        tell_of_finished(config, report, progress)
    return report
