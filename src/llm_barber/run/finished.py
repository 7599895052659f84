"""Recognise a finished run: the output that a run would write is there already, and whole."""

from collections.abc import Iterator, Sequence
from os.path import abspath, exists, expanduser, isdir
from pathlib import Path

from llm_barber.checkpoint.hub import is_hub_id
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.unfinished import both_values
from llm_barber.errors import CalibrationError, ModelError, OutputError, UnfinishedRunError
from llm_barber.loading.preparing import read_calibration
from llm_barber.method.checkpoint_masks import pruned_key
from llm_barber.progress import Progress
from llm_barber.record.file import read_record
from llm_barber.record.report import RunReport, SourceFiles
from llm_barber.record.verification import changed_files, unknown_files
from llm_barber.run.resuming import warn_of_written
from llm_barber.run.same_settings import MODELS, differing_text, other_settings
from llm_barber.settings.base import Format
from llm_barber.settings.prune import RunSettings
from llm_barber.text.calibration import HUB_SETS

PRUNE_AGAIN = "prune again with --overwrite"


def finished_run(config: RunSettings, progress: Progress) -> RunReport | None:
    """Report of this same run, if it resumes and its output is complete; reads every file.

    Returns:
        None: there is no such output, or an output that is damaged or of another run may be overwritten.

    Raises:
        OutputError: a file of the output is missing or changed.
        UnfinishedRunError: the output is complete, by a run with other settings, models or text.
    """
    try:
        record = read_record(config.output) if config.resume else None
    except ModelError as error:
        if config.overwrite:
            return None
        raise OutputError(str(error), f"choose another output folder, or {PRUNE_AGAIN}") from error
    if record is None or record.command != config.command:
        return None
    if differences := list(other_settings(record, config)):
        _refuse("is complete, by a run with other settings: ", differences, config)
        return None
    if damage := _damage(config.output, record, progress):
        if config.overwrite:
            return None
        raise OutputError(f"{config.output} was complete, but {damage}", f"{PRUNE_AGAIN}, or get the file back")
    if changed := _changed_since(record, config):
        _refuse("is complete, but was ", [changed], config)
        return None
    if differences := list(_other_inputs(record, config, progress)):
        _refuse("is complete, but was made with ", differences, config)
        return None
    return record.model_copy(update={"output": str(config.output)})  # the folder may have been moved


def _refuse(why: str, differences: Sequence[str], config: RunSettings) -> None:
    """Refuse an output of another run, unless it may be overwritten."""
    if not config.overwrite:
        raise UnfinishedRunError(
            f"{config.output} {why}{', '.join(differences)}",
            f"choose another output folder, or {PRUNE_AGAIN}",
        )


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


def _changed_since(record: RunReport, config: RunSettings) -> str:
    """Say what another command made of a finished output, as a sentence's end; empty: it is as the run wrote it."""
    if record.fine_tuning is not None:
        return "fine-tuned since"
    if record.rounding is not None:
        return "rounded since"
    is_packed = bool(CheckpointSource(config.output).packed)
    if is_packed is not (config.format is Format.PACKED):
        return "packed since" if is_packed else "unpacked since"
    return ""


def _other_inputs(record: RunReport, config: RunSettings, progress: Progress) -> Iterator[str]:
    """Models and text that are others than those of the finished run, as far as local files show."""
    files = {"model": record.source, "dense": record.source, "pruned": record.pruned_source}
    for name in MODELS:
        if hasattr(config, name):
            yield from _other_model(name, record, config, files[name], progress)
    differing = differing_text(record, config)
    if config.calibration in HUB_SETS:
        yield from differing
        return
    try:
        tokens = read_calibration(config, config.output)  # its tokenizer is the model's, and was verified
    except CalibrationError as error:
        if exists(expanduser(config.calibration)):
            differing = differing or [f"another calibration text: {error}"]
        else:
            progress.warn(f"the calibration text of {config.output} cannot be compared: {error}")
        yield from differing
        return
    before = record.calibration
    if (tokens.digest, *tokens.input_ids.shape) != (before.sha256, before.sequences, before.tokens):
        yield from differing or ["another calibration text"]


def _other_model(
    name: str, record: RunReport, config: RunSettings, files: SourceFiles | None, progress: Progress
) -> Iterator[str]:
    """Compare a local model with the files that a finished run read; warn of files with a new date alone.

    Of a model of the hub, which is not fetched again for it, and of one that is gone, names are compared.
    """
    model: str = getattr(config, name)
    path = expanduser(model)
    if not exists(path):
        recorded, revision = record.settings.get(name), MODELS[name]
        if recorded not in (model, abspath(path)):
            yield both_values(name, recorded, model)
        elif recorded != model or not is_hub_id(model):
            progress.warn(f"{model} is not there any more, and cannot be compared with the model of the finished run")
        elif (recorded := record.settings.get(revision)) != getattr(config, revision):
            yield both_values(revision, recorded, getattr(config, revision))
        return
    if files is None:
        progress.warn(f"{model} cannot be compared with the model of the finished run, whose record names no files")
        return
    try:
        source = CheckpointSource(model)
        key = pruned_key(source) if name == "pruned" else source.key
    except ModelError:
        key = ""
    except OutputError as error:  # a GGUF file is converted, and the cache takes no more
        progress.warn(f"{model} cannot be compared with the model of the finished run: {error}")
        return
    if key != files.key:
        yield f"other files of {model}"
    elif isdir(path):  # files that a GGUF file was converted to have the date of that
        warn_of_written(source.written, files.written, progress)
