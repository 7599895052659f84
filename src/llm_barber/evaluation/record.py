"""The evaluation kept beside a pruned model's record, for its page."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_barber.checkpoint.companions import EVALUATION_NAME
from llm_barber.checkpoint.durable import write_durably
from llm_barber.checkpoint.untrusted import read_result
from llm_barber.errors import ModelError
from llm_barber.evaluation.result import Evaluation, TaskResult, TextResult

Result = TypeVar("Result", TextResult, TaskResult)


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


def keep_evaluation(folder: Path, evaluation: Evaluation) -> bool:
    """Store an evaluation of the folder's model.

    The results of an earlier evaluation that was measured alike stay, except on texts and tasks that are
    measured again.

    Returns:
        True if an earlier evaluation, which was measured in another way, was replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        earlier = read_evaluation(folder)
    except ModelError:
        earlier = None
    alike = earlier is not None and _are_alike(earlier, evaluation)
    if earlier is not None and alike:
        texts = _joined(earlier.texts, evaluation.texts, lambda text: text.text)
        tasks = _joined(earlier.tasks, evaluation.tasks, lambda task: (task.task, task.metric))
        joined = {"texts": texts, "tasks": tasks, "against": evaluation.against or earlier.against}
        evaluation = evaluation.model_copy(update=joined)
    write_durably(folder / EVALUATION_NAME, f"{evaluation.model_dump_json(indent=1)}\n".encode())
    return earlier is not None and not alike


def _are_alike(earlier: Evaluation, new: Evaluation) -> bool:
    """True if the results of two evaluations can stand side by side, in one evaluation.

    Device, dtype and versions are the same, and so is the model to compare with, if both have one.
    """
    if any(getattr(earlier, name) != getattr(new, name) for name in ("device", "dtype", "versions")):
        return False
    if earlier.against is None or new.against is None or earlier.against == new.against:
        return True
    paths = [Path(os.path.expanduser(against)) for against in (earlier.against, new.against)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _joined(earlier: Sequence[Result], new: Sequence[Result], name: Callable[[Result], Any]) -> tuple[Result, ...]:
    """Earlier and new results; of two with the same name the new one.

    An earlier result stays if the new one differs only in that it has no comparison.
    """
    results = {name(result): result for result in earlier}
    for result in new:
        before = results.get(name(result))
        if before is not None and result.against is None and before.model_copy(update={"against": None}) == result:
            continue
        results[name(result)] = result
    return tuple(results.values())
