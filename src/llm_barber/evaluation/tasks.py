"""Multiple-choice tasks: which there are, local files, and accuracies with their standard errors.

The tasks are run by lm-eval (`harness.py`); what is here does not need it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llm_barber.checkpoint.regular import check_regular
from llm_barber.checkpoint.untrusted import parse_json
from llm_barber.errors import TaskError

# The seven of arXiv 2408.10631, as lm-eval names them.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PAPER = "paper"
# What a line of a local file holds: a question with choices, or a sentence with two beginnings (winogrande).
QUESTION_FIELDS = {"query": str, "choices": list, "gold": int}
BEGINNING_FIELDS = {"context_options": list, "continuation": str, "gold": int}
# Between a question and its answer; the other tasks ask, hellaswag's choices go on with the sentence.
CONTINUED = ("hellaswag",)


@dataclass(frozen=True)
class Task:
    """A task to run: by lm-eval's name, or with the examples of a local file."""

    name: str
    examples: list[dict[str, Any]] | None = None
    file: Path | None = None
    sha256: str | None = None


class TaskComparison(BaseModel):
    """Another model's value, and ours minus it with the standard error of that difference, paired by example."""

    model_config = ConfigDict(frozen=True)

    value: float
    difference: float
    standard_error: float


class TaskResult(BaseModel):
    """One metric of one task: accuracies from 0 to 1, their standard errors, examples, and where they came from."""

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    value: float
    standard_error: float
    examples: int
    shots: int
    source: str
    sha256: str | None
    against: TaskComparison | None


@dataclass(frozen=True)
class TaskRun:
    """What one model did: results, and for each (task, metric) the value of every example in order."""

    results: tuple[TaskResult, ...]
    by_example: dict[tuple[str, str], list[float]] = field(default_factory=dict)


def find_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> tuple[Task, ...]:
    """The tasks of some names: `paper` is the paper's seven; with a folder, its files, all of them if none is named.

    Raises:
        TaskError: there is no such file, or a line of one is wrong.
    """
    wanted = list(dict.fromkeys(task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))))
    if folder is None:
        return tuple(Task(name) for name in wanted)
    if not folder.is_dir():
        raise TaskError(f"tasks folder {folder} is not there", "give a folder with one .jsonl file a task")
    files = {_plain(path.stem): path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise TaskError(f"no .jsonl file in {folder}", "give a folder with one .jsonl file a task")
    missing = [name for name in wanted if _plain(name) not in files]
    if missing:
        raise TaskError(
            f"no file for task {', '.join(missing)} in {folder}",
            f"there are {', '.join(path.stem for path in files.values())}",
        )
    chosen = [files[_plain(name)] for name in wanted] or list(files.values())
    return tuple(_read_task(path, limit) for path in chosen)


def compare_tasks(run: TaskRun, other: TaskRun | None) -> tuple[TaskResult, ...]:
    """Our results, each with its difference from the other model's.

    The standard error is that of the mean of the examples' differences: models that fail on the same examples differ
    by less than their own standard errors say.
    """
    if other is None:
        return run.results
    theirs = {(result.task, result.metric): result for result in other.results}
    results = []
    for result in run.results:
        key = (result.task, result.metric)
        differences = [ours - its for ours, its in zip(run.by_example[key], other.by_example[key], strict=True)]
        mean, error = mean_and_standard_error(differences)
        compared = TaskComparison(value=theirs[key].value, difference=mean, standard_error=error)
        results.append(result.model_copy(update={"against": compared}))
    return tuple(results)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the sample standard deviation over √n, of two or more values."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def _plain(name: str) -> str:
    """openbookqa and openbook_qa are one task."""
    return name.replace("_", "").replace("-", "").lower()


def _read_task(path: Path, limit: int | None) -> Task:
    examples: list[dict[str, Any]] = []
    fields: dict[str, type] | None = None
    check_regular(path, TaskError)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # other line ends may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}", "it must be UTF-8 JSON lines") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = parse_json(line)
        except ValueError as error:
            raise TaskError(f"{path} line {number} is not JSON: {error}", "each line is one JSON object") from error
        if fields is None:
            fields = BEGINNING_FIELDS if isinstance(example, dict) and "continuation" in example else QUESTION_FIELDS
        problem = _problem(example, fields)
        if problem:
            raise TaskError(
                f"{path} line {number}: {problem}",
                f"each line has {', '.join(fields)}; gold is the right one's number, from 0",
            )
        examples.append({name: example[name] for name in fields})
        if limit is not None and len(examples) == limit:
            break
    if len(examples) < 2:
        raise TaskError(f"{path} has fewer than two examples", "each line is one JSON object")
    return Task(path.stem, examples, path, hashlib.sha256(content).hexdigest())


def _problem(example: Any, fields: dict[str, type]) -> str | None:
    """What is wrong with an example, if anything."""
    if not isinstance(example, dict):
        return "is not an object"
    for name, kind in fields.items():
        if name not in example:
            return f"has no {name}"
        value = example[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {type(value).__name__}, not {kind.__name__}"
        if isinstance(value, list) and (len(value) < 2 or not all(isinstance(one, str) and one for one in value)):
            return f"{name} is not a list of two or more texts"
        if kind is str and not value:
            return f"{name} is empty"
    choices = next(example[name] for name, kind in fields.items() if kind is list)
    if not 0 <= example["gold"] < len(choices):
        return f"gold is {example['gold']}, with {len(choices)} choices"
    return None
