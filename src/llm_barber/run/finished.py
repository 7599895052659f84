"""Recognise a finished run: the output that a run would write is there already, and whole."""

from os.path import expanduser
from pathlib import Path

from llm_barber.checkpoint.hub import is_hub_id
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.unfinished import both_values, differing_names
from llm_barber.errors import CalibrationError, ModelError, OutputError, UnfinishedRunError
from llm_barber.loading.preparing import read_calibration
from llm_barber.messages import Message, joined
from llm_barber.method.checkpoint_masks import pruned_key
from llm_barber.progress import Progress
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport, SourceFiles
from llm_barber.record.verification import changed_files, unknown_files
from llm_barber.run.resume_key import NOT_IN_KEY
from llm_barber.run.resuming import warn_of_written
from llm_barber.settings.run import RunSettings
from llm_barber.text.calibration import HUB_SETS

PRUNE_AGAIN = "prune again with --overwrite"


def finished_run(config: RunSettings, progress: Progress) -> RunReport | None:
    """Report of this same run, if it resumes and its output is complete; reads every file.

    Returns:
        None: there is no such output, or a damaged output may be overwritten.

    Raises:
        OutputError: a file of the output is missing or changed; or the models or the calibration text have changed.
        UnfinishedRunError: the output is complete, by a run with other settings.
    """
    try:
        record = read_record(config.output) if config.resume else None
    except ModelError as error:
        if config.overwrite:
            return None
        raise OutputError(str(error), f"choose another output folder, or {PRUNE_AGAIN}") from error
    if record is None or record.command != config.command:
        return None
    recorded = {name: value for name, value in record.settings.items() if name not in NOT_IN_KEY}
    given = config.model_dump(mode="json", exclude=NOT_IN_KEY)
    if differing := differing_names(recorded, given):
        if config.overwrite:
            return None
        differences = (both_values(name, recorded.get(name), given.get(name)) for name in differing)
        raise UnfinishedRunError(
            Message(f"{config.output} is complete, by a run with other settings: ", joined(", ", differences)),
            f"choose another output folder, or {PRUNE_AGAIN}",
        )
    if damage := _damage(config.output, record, progress):
        if config.overwrite:
            return None
        raise OutputError(f"{config.output} was complete, but {damage}", f"{PRUNE_AGAIN}, or get the file back")
    if changed := _changed(record, config, progress):
        raise UnfinishedRunError(
            f"{config.output} is complete, but was made with {changed}",
            f"choose another output folder, or {PRUNE_AGAIN}",
        )
    return record


def tell_of_finished(config: RunSettings, record: RunReport, progress: Progress) -> None:
    """Say that the output is complete, and which of its files the run did not write."""
    if unknown := unknown_files(CheckpointSource(config.output), record):
        progress.warn(f"{config.output} has files that this program did not write: {'; '.join(unknown[:3])}")
    progress.warn(f"{config.output} is complete, by a run with these settings: nothing is left to do")


def _damage(output: Path, record: RunReport, progress: Progress) -> str:
    """Missing or changed file of a finished output, as the end of a sentence; empty: the output is whole."""
    try:
        problems = changed_files(CheckpointSource(output), record, progress)
    except ModelError as error:
        return str(error)
    return problems[0] if problems else ""


def _changed(record: RunReport, config: RunSettings, progress: Progress) -> str:
    """Input that changed since a run finished, as far as local files show; empty: none did."""
    changed = _changed_model(record.model, record.source, progress)
    if not changed and record.command == "rebuild":
        changed = _changed_model(record.settings["pruned"], record.pruned_source, progress, of_pruned=True)
    if changed or config.calibration in HUB_SETS:
        return changed
    try:
        tokens = read_calibration(config, config.output)  # its tokenizer is the model's, and was verified
    except CalibrationError as error:
        progress.warn(f"the calibration text of {config.output} cannot be compared: {error}")
        return ""
    return "" if tokens.digest == record.calibration.sha256 else "another calibration text"


def _changed_model(model: str, recorded: SourceFiles | None, progress: Progress, of_pruned: bool = False) -> str:
    """Compare a local model with the files that a finished run read; warn of files with a new date alone.

    A model of the hub is not fetched again for it.
    """
    path = Path(expanduser(model))
    if recorded is None or not path.exists():
        if not is_hub_id(model):
            progress.warn(f"{model} is not there any more, and cannot be compared with the model of the finished run")
        return ""
    try:
        source = CheckpointSource(model)
        key = pruned_key(source) if of_pruned else source.key
    except ModelError:
        return f"other files of {model}"
    except OutputError as error:  # a GGUF file is converted, and the cache takes no more
        progress.warn(f"{model} cannot be compared with the model of the finished run: {error}")
        return ""
    if key != recorded.key:
        return f"other files of {model}"
    if path.is_dir():  # files that a GGUF file was converted to have the date of that
        warn_of_written(source.written, recorded.written, progress)
    return ""
