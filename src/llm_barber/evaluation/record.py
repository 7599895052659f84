"""The evaluation kept beside a pruned model's record, for its page."""

import os
from pathlib import Path

from pydantic import ValidationError

from llm_barber.errors import ModelError
from llm_barber.evaluation.evaluate import Evaluation

EVALUATION_NAME = "evaluation.json"


def read_evaluation(folder: Path) -> Evaluation | None:
    """What is kept; None if there is nothing.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / EVALUATION_NAME
    if not path.exists():
        return None
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ModelError(f"{path} is damaged", "remove it, and evaluate again") from error


def keep_evaluation(folder: Path, evaluation: Evaluation) -> Evaluation:
    """Keep an evaluation of the folder's model; what it has not measured again stays, if it was measured alike.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        kept = read_evaluation(folder)
    except ModelError:
        kept = None
    alike = ("against", "device", "dtype", "versions")
    if kept is not None and all(getattr(kept, name) == getattr(evaluation, name) for name in alike):
        texts = {text.text: text for text in (*kept.texts, *evaluation.texts)}
        tasks = {(task.task, task.metric): task for task in (*kept.tasks, *evaluation.tasks)}
        evaluation = evaluation.model_copy(update={"texts": tuple(texts.values()), "tasks": tuple(tasks.values())})
    temporary = folder / f"{EVALUATION_NAME}.tmp"
    temporary.write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / EVALUATION_NAME)
    return evaluation
