"""Write the page of a finished run into its folder, and keep the evaluation that the page shows."""

import os
from pathlib import Path

from llm_barber.checkpoint.companions import EVALUATION_NAME, PAGE_NAME, RECORD_NAME
from llm_barber.checkpoint.durable import write_durably
from llm_barber.checkpoint.untrusted import check_regular, read_result
from llm_barber.errors import ModelError, OutputError
from llm_barber.evaluation.result import Evaluation
from llm_barber.page.run_page import run_page
from llm_barber.progress import Progress
from llm_barber.record.file import read_record
from llm_barber.settings.base import takes
from llm_barber.settings.tools import ReportConfig

PAGE_MARK = b'<meta name="generator" content="LLM-Barber">'
PAGE_BEGINNING = 1000  # bytes; the mark is among them


@takes(ReportConfig)
def report(config: ReportConfig) -> Path:
    """Write the page of a finished run, and return its path.

    Raises:
        ModelError: the folder has no record, or a damaged one.
        OutputError: the page cannot be written.
    """
    return write_page(config.folder, config.output)


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a folder's record, with its evaluation if there is one; return the page's path.

    Args:
        folder: output of `prune` or `rebuild`.
        output: the file to write; None: `report.html` in the folder.

    Raises:
        ModelError: the folder has no record, or a damaged one.
        OutputError: the page cannot be written, or would replace a folder, a device or a file of another kind.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "give a folder that llm-barber prune or rebuild wrote")
    report = read_record(folder)
    if report is None:
        raise ModelError(
            f"{folder} has no record (barber.json)", "give a folder that llm-barber prune or rebuild wrote"
        )
    path = output or folder / PAGE_NAME
    another = "choose another file with --output"
    try:
        check_regular(path, OutputError)
        if path.exists() and PAGE_MARK not in path.read_bytes()[:PAGE_BEGINNING]:
            raise OutputError(f"{path} is not a page of this program, and would be replaced", another)
        write_durably(path, run_page(report, read_evaluation(folder)).encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", another) from error
    return path


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation stored in a folder; None: there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / EVALUATION_NAME
    if not path.exists():
        return None
    try:
        return read_result(path, Evaluation)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged", "remove it, and evaluate again") from error


def keep_with_model(evaluation: Evaluation, progress: Progress) -> None:
    """Store an evaluation beside the record of its model, and show it on the page if the run has one.

    Results of an earlier evaluation that was measured alike stay, except those of the same texts and tasks. Nothing is
    written for a model without a record.
    """
    folder = Path(os.path.expanduser(evaluation.model))
    if not (folder / RECORD_NAME).is_file():
        return
    try:
        earlier = read_evaluation(folder)
    except ModelError:
        earlier = None
    alike = earlier is not None and all(
        getattr(earlier, name) == getattr(evaluation, name) for name in ("against", "device", "dtype", "versions")
    )
    if earlier is not None and alike:
        texts = {result.text: result for result in (*earlier.texts, *evaluation.texts)}
        tasks = {(result.task, result.metric): result for result in (*earlier.tasks, *evaluation.tasks)}
        joined = {"texts": tuple(texts.values()), "tasks": tuple(tasks.values())}
        evaluation = evaluation.model_copy(update=joined)
    elif earlier is not None:
        progress.warn(f"the evaluation kept in {folder} before was measured in another way, and is replaced")
    try:
        write_durably(folder / EVALUATION_NAME, f"{evaluation.model_dump_json(indent=1)}\n".encode())
    except OSError as error:
        progress.warn(f"the evaluation could not be kept in {folder}: {error}")
        return
    kept = f"kept in {folder / EVALUATION_NAME}"
    try:
        record = read_record(folder)
        has_page = (folder / PAGE_NAME).exists() or (record is not None and record.settings.get("report", True))
        progress.stage(f"{kept}, shown in {write_page(folder)}" if has_page else kept)
    except (OutputError, ModelError) as error:
        progress.warn(f"the evaluation is {kept}, but the page does not show it: {error}")
