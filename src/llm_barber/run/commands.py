"""The commands `prune` and `rebuild`: what each hands to the run (`run.py`)."""

from os.path import expanduser
from pathlib import Path

from llm_barber.checkpoint.output import clear_finished
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.errors import CalibrationError, ModelError, OutputError
from llm_barber.loading.job import Job, prepare, read_calibration
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.method.checkpoint_masks import CheckpointMasks, pruned_key
from llm_barber.method.method_masks import MethodMasks
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.parallel.ranks import Ranks, joined
from llm_barber.progress import Progress, Silent
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport, SourceFiles
from llm_barber.record.verification import changed_files, unknown_files
from llm_barber.run.assignment import UNLIKE, Assignment
from llm_barber.run.resuming import warn_of_written
from llm_barber.run.stream import run
from llm_barber.settings.initial import Initial, rebuild_defaults
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.run import RunSettings
from llm_barber.settings.targets import Targets
from llm_barber.text.calibration import HUB_SETS

PRUNE_AGAIN = "prune again with --overwrite"


def prune(config: PruneConfig, progress: Progress | None = None) -> RunReport:
    """Prune a dense model and rebuild its mask; writes `config.output`.

    Raises:
        BarberError: anything that is wrong with settings, model, calibration or output; nothing is left behind.
    """
    progress = progress or Silent()
    with joined() as ranks:
        return _finished_before(config, progress, ranks) or _prune(config, progress, ranks)


def opened(config: PruneConfig | RebuildConfig, progress: Progress, ranks: Ranks) -> Assignment:
    """What a command is to do, opened and checked.

    Raises:
        BarberError: as `prune` and `rebuild`.
    """
    if isinstance(config, PruneConfig):
        return pruning(config, progress, ranks)
    return rebuilding(config, progress, ranks)


def pruning(config: PruneConfig, progress: Progress, ranks: Ranks) -> Assignment:
    """What `prune` is to do, opened and checked.

    Raises:
        BarberError: as `prune`.
    """
    job = prepare(config.model, config, config.targets, progress, ranks)
    rebuild_settings = _rebuild_settings(config, config.method, config.target)
    initial = MethodMasks(job, config.method, config.targets, config.initial_granularity, config.keep_updates)
    return Assignment("prune", config.model, config, job, initial, rebuild_settings, config.method, config.method)


def _prune(config: PruneConfig, progress: Progress, ranks: Ranks) -> RunReport:
    work = pruning(config, progress, ranks)
    report = run(work, progress)
    asked = _asked_for(report, config.targets, work.job)
    if abs(report.sparsity - asked) > 0.01 * asked:
        progress.warn(
            f"sparsity {asked:.4g} was asked for, {report.sparsity:.4g} is what whole weights allow "
            "in comparison groups of this size, of which each keeps a weight"
        )
    return report


def _rebuild_settings(config: RunSettings, method: Initial, pattern: Pattern | None) -> RebuildSettings | None:
    """How masks are rebuilt, if they are; linears with N:M as the released program does, unless told otherwise."""
    if not config.rebuilds:
        return None
    granularity, ratio = rebuild_defaults(method, config.granularity, config.rebuild_ratio, pattern)
    return RebuildSettings(granularity, ratio, None if config.granularity else Granularity.OUTPUT)


def _asked_for(report: RunReport, targets: Targets, job: Job) -> float:
    """The sparsity over all linears, those that are not pruned among them, that the targets ask for."""
    wanted = 0.0
    for layer in report.layers:
        for linear in layer.linears:
            target = targets.of(layer.index, job.linear_name(layer.index, linear.name), job.layer_count)
            rows, columns = linear.shape
            columns = target.covered(columns) if isinstance(target, NofM) else columns
            wanted += target.sparsity * rows * columns if target else 0
    return wanted / report.weights


def rebuild(config: RebuildConfig, progress: Progress | None = None) -> RunReport:
    """Rebuild the mask of a pruned model with its dense one; writes `config.output`.

    Raises:
        BarberError: anything that is wrong with settings, models, calibration or output; nothing is left behind.
    """
    progress = progress or Silent()
    with joined() as ranks:
        return _finished_before(config, progress, ranks) or run(rebuilding(config, progress, ranks), progress)


def rebuilding(config: RebuildConfig, progress: Progress, ranks: Ranks) -> Assignment:
    """What `rebuild` is to do, opened and checked.

    Raises:
        BarberError: as `rebuild`.
    """
    job = prepare(config.dense, config, None, progress, ranks)
    initial = CheckpointMasks(job, config.pruned, config.pattern, config.pruned_revision)
    if initial.head_was_pruned:
        progress.warn(f"the output head of {config.pruned} was pruned, too: it is DENSE's in the result")
    method = config.initial or initial.recorded_method
    settings = _rebuild_settings(config, method, initial.pattern)
    return Assignment("rebuild", config.dense, config, job, initial, settings, method, f"mask of {config.pruned}")


def _finished_before(config: RunSettings, progress: Progress, ranks: Ranks) -> RunReport | None:
    """The report of this same run, where it is to be resumed and was finished: as when a job is queued again."""
    report = ranks.from_first(finished_run(config, progress) if ranks.is_first else None)
    if report is not None:
        if ranks.is_first and (config.output / STATE_NAME).is_file():  # it was killed when its output was whole
            clear_finished(config.output)
        tell_of_finished(config, report, progress)
    return report


def finished_run(config: RunSettings, progress: Progress) -> RunReport | None:
    """The report of this same run, if it is to be resumed and its output is complete; every file is read.

    Returns:
        None: there is no such output, or it is not whole and may be overwritten.

    Raises:
        OutputError: a file of the output is missing or changed; the models or the calibration text are others now.
    """
    try:
        record = read_record(config.output) if config.resume else None
    except ModelError as error:
        if config.overwrite:
            return None
        raise OutputError(str(error), f"choose another output folder, or {PRUNE_AGAIN}") from error
    if record is None or record.command != config.command:
        return None
    recorded = {name: value for name, value in record.settings.items() if name not in UNLIKE}
    if recorded != config.model_dump(mode="json", exclude=UNLIKE):
        return None
    if damage := _damage(config.output, record, progress):
        if config.overwrite:
            return None
        raise OutputError(f"{config.output} was complete, but {damage}", f"{PRUNE_AGAIN}, or get the file back")
    if changed := _changed(record, config, progress):
        raise OutputError(
            f"{config.output} is complete, but was made with {changed} than is there now",
            f"choose another output folder, or {PRUNE_AGAIN}",
        )
    return record


def tell_of_finished(config: RunSettings, record: RunReport, progress: Progress) -> None:
    """Say that the output is what this run would make, and which files in it are no part of that."""
    if unknown := unknown_files(CheckpointSource(config.output), record):
        progress.warn(f"{config.output} is not as it was written: {'; '.join(unknown[:3])}")
    progress.warn(f"{config.output} is complete, by a run with these settings: nothing is left to do")


def _damage(output: Path, record: RunReport, progress: Progress) -> str:
    """The first file of a finished output that is missing or changed, as the end of a sentence."""
    try:
        problems = changed_files(CheckpointSource(output), record, progress)
    except ModelError as error:
        return str(error)
    return problems[0] if problems else ""


def _changed(record: RunReport, config: RunSettings, progress: Progress) -> str:
    """The input of a finished run that is another one now, as far as local files show."""
    changed = _changed_model(record.model, record.source, progress)
    if not changed and record.command == "rebuild":
        changed = _changed_model(record.settings["pruned"], record.pruned_source, progress, of_pruned=True)
    folder = Path(expanduser(record.model))
    if changed or not folder.is_dir() or config.calibration in HUB_SETS:
        return changed
    try:
        tokens = read_calibration(config, folder)
    except CalibrationError as error:
        progress.warn(f"the calibration text of {config.output} cannot be compared: {error}")
        return ""
    return "" if tokens.digest == record.calibration.sha256 else "another calibration text"


def _changed_model(model: str, recorded: SourceFiles | None, progress: Progress, of_pruned: bool = False) -> str:
    """Compare a local model with the files that a finished run read; warn if they were only written anew."""
    folder = Path(expanduser(model))
    if recorded is None or not folder.is_dir():
        is_path = folder.is_absolute() or model.startswith((".", "~"))  # else it is a hub id
        if is_path and not folder.exists():  # a GGUF file is there
            progress.warn(f"{model} is not there any more, and cannot be compared with the model of the finished run")
        return ""
    try:
        source = CheckpointSource(model)
        key = pruned_key(source) if of_pruned else source.key
    except ModelError:
        return f"other files of {model}"
    if key != recorded.key:
        return f"other files of {model}"
    warn_of_written(source.written, recorded.written, progress)
    return ""
