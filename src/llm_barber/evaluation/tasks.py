"""Multiple-choice tasks: names, local files of examples, comparison of two models' accuracies.

lm-eval runs the tasks (`harness.py`); this file does not need it.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator

from llm_barber.checkpoint.untrusted import check_regular
from llm_barber.errors import TaskError
from llm_barber.evaluation.result import TaskComparison, TaskResult

# The seven tasks of arXiv 2408.10631, by lm-eval's names.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PAPER = "paper"
# Plain names of tasks whose choices go on with the sentence; in the other tasks they answer a question.
CONTINUED = ("hellaswag",)
ONE_A_TASK = "give a folder with one .jsonl file a task"
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=2)]


class Question(BaseModel):
    """A line of a local file: a question with choices; `gold` is the right one's number, from 0."""

    query: Text
    choices: Choices
    gold: NonNegativeInt

    @model_validator(mode="after")
    def _gold_is_a_choice(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, with {len(self.choices)} choices")
        return self


class Beginnings(Question):
    """A line of a local file: a sentence with two beginnings or more, as winogrande has it."""

    query: Text = Field(alias="continuation")
    choices: Choices = Field(alias="context_options")


@dataclass(frozen=True)
class Task:
    """A task to run: lm-eval's task of this name, or the examples of a local file."""

    name: str
    examples: list[dict[str, Any]] | None = None
    file: Path | None = None
    sha256: str | None = None


def find_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> tuple[Task, ...]:
    """Find the tasks to run: lm-eval's, or the files of a folder.

    The name `paper` stands for the seven tasks of the paper.

    Args:
        names: of tasks; none with a folder: all its files.
        folder: holds a .jsonl file for each task; None: lm-eval's tasks.
        limit: examples of each file, at most.

    Raises:
        TaskError: a file is missing, one of its lines is wrong, or two files are of one task.
    """
    selected = list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))))
    if folder is None:
        return tuple(Task(name) for name in selected)
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}", ONE_A_TASK)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        other = files.setdefault(_plain(path.stem), path)
        if other is not path:
            raise TaskError(f"{other} and {path.name} are files of one task", "remove or rename one of them")
    if not files:
        raise TaskError(f"no .jsonl file in {folder}", ONE_A_TASK)
    missing = [name for name in selected if _plain(name) not in files]
    if missing:
        raise TaskError(
            f"no file for task {', '.join(missing)} in {folder}",
            f"there are {', '.join(path.stem for path in files.values())}",
        )
    chosen = [files[_plain(name)] for name in selected] or list(files.values())
    return tuple(_read_task(path, limit) for path in chosen)


def lm_eval_version() -> str:
    """Name of lm-eval with its version, which decides the prompts and examples of tasks without a local file."""
    try:
        return f"lm-eval {version('lm-eval')}"
    except PackageNotFoundError:
        return "lm-eval"


def compare_tasks(results: Sequence[TaskResult], others: Sequence[TaskResult]) -> tuple[TaskResult, ...]:
    """Add the difference from the other model's results, on the same examples, to each result of a model.

    The standard error is that of the mean of the examples' differences: models that fail on the same examples differ
    by less than their own standard errors say. Of a metric that is a probability it is that of independent samples.
    """
    by_name = {(other.task, other.metric): other for other in others}
    compared = []
    for result in results:
        other = by_name[result.task, result.metric]
        difference, error = result.value - other.value, math.hypot(result.standard_error, other.standard_error)
        if result.right is not None and other.right is not None:
            pairs = zip(result.right, other.right, strict=True)
            difference, error = mean_and_standard_error([int(digit) - int(before) for digit, before in pairs])
        comparison = TaskComparison(value=other.value, difference=difference, standard_error=error)
        compared.append(result.model_copy(update={"against": comparison}))
    return tuple(compared)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of two or more values, and their sample standard deviation over √n."""
    return statistics.fmean(values), math.sqrt(statistics.variance(values) / len(values))


def continues_sentence(task: str) -> bool:
    """True if the choices of a local file's task go on with the sentence; False: they answer a question."""
    return _plain(task) in CONTINUED


def _plain(name: str) -> str:
    """A task's name without punctuation and case: openbookqa and openbook_qa are one task."""
    return name.replace("_", "").replace("-", "").lower()


def _read_task(path: Path, limit: int | None) -> Task:
    check_regular(path, TaskError)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}", "it must be UTF-8 JSON lines") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if len(filled) < 2:
        raise TaskError(f"{path} has fewer than two examples", "each line is one JSON object")
    kind = Beginnings if '"continuation"' in filled[0][1] else Question
    examples = []
    for number, line in filled:
        try:
            examples.append(kind.model_validate_json(line, strict=True).model_dump(by_alias=True))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise TaskError(
                f"{path} line {number}: {where}{': ' * bool(where)}{first['msg']}",
                "each line has query, choices, gold or context_options, continuation, gold; gold is the right one's "
                "number, from 0",
            ) from error
    return Task(path.stem, examples, path, hashlib.sha256(content).hexdigest())
