"""The evaluation kept beside a pruned model's record, for its page."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_barber.checkpoint.companions import EVALUATION_NAME
from llm_barber.checkpoint.untrusted import read_result
from llm_barber.errors import ModelError
from llm_barber.evaluation.evaluate import Evaluation, TextResult
from llm_barber.evaluation.tasks import TaskResult

Result = TypeVar("Result", TextResult, TaskResult)


def read_evaluation(folder: Path) -> Evaluation | None:
    """What is kept; None if there is nothing.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / EVALUATION_NAME
    if not path.exists():
        return None
    try:
        return read_result(path, Evaluation)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged", "remove it, and evaluate again") from error


def keep_evaluation(folder: Path, evaluation: Evaluation) -> bool:
    """Keep an evaluation of the folder's model; what it has not measured or compared again stays, if measured alike.

    Returns whether an earlier one was replaced, which was measured otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        kept = read_evaluation(folder)
    except ModelError:
        kept = None
    alike = kept is not None and _are_alike(kept, evaluation)
    if kept is not None and alike:
        texts = _joined(kept.texts, evaluation.texts, lambda text: text.text)
        tasks = _joined(kept.tasks, evaluation.tasks, lambda task: (task.task, task.metric))
        found = {"texts": texts, "tasks": tasks, "against": evaluation.against or kept.against}
        evaluation = evaluation.model_copy(update=found)
    temporary = folder / f"{EVALUATION_NAME}.tmp"
    temporary.write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / EVALUATION_NAME)
    return kept is not None and not alike


def _are_alike(kept: Evaluation, new: Evaluation) -> bool:
    """Can their results stand side by side? Models that they are compared with are the same, if both are."""
    if any(getattr(kept, name) != getattr(new, name) for name in ("device", "dtype", "versions")):
        return False
    if kept.against is None or new.against is None:
        return True
    one, other = (Path(os.path.expanduser(against)) for against in (kept.against, new.against))
    return kept.against == new.against or (one.exists() and other.exists() and one.resolve() == other.resolve())


def _joined(kept: Sequence[Result], new: Sequence[Result], name: Callable[[Result], Any]) -> tuple[Result, ...]:
    """Results by their names, the new ones where both have one; a comparison stays with a result that is the same."""
    found = {name(one): one for one in kept}
    for one in new:
        before = found.get(name(one))
        if before is not None and one.against is None and before.model_copy(update={"against": None}) == one:
            continue
        found[name(one)] = one
    return tuple(found.values())
