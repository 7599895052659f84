"""Multiple-choice tasks: names, local files of examples, comparison of two models' accuracies.

lm-eval runs the tasks (`harness.py`); this file does not need it.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.regular import check_regular
from llm_barber.checkpoint.untrusted import parse_json
from llm_barber.errors import TaskError
from llm_barber.evaluation.result import TaskComparison, TaskResult

# The seven tasks of arXiv 2408.10631, by lm-eval's names.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PAPER = "paper"
# Fields of a line of a local file: a question with choices, or a sentence with two beginnings (winogrande).
QUESTION_FIELDS = {"query": str, "choices": list, "gold": int}
BEGINNING_FIELDS = {"context_options": list, "continuation": str, "gold": int}
# Plain names of tasks whose choices go on with the sentence; in the other tasks they answer a question.
CONTINUED = ("hellaswag",)


@dataclass(frozen=True)
class Task:
    """A task to run: lm-eval's task of this name, or the examples of a local file."""

    name: str
    examples: list[dict[str, Any]] | None = None
    file: Path | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class TaskRun:
    """One model's results, and, by task and metric, the value of every example in order."""

    results: tuple[TaskResult, ...]
    by_example: dict[tuple[str, str], list[float]] = field(default_factory=dict)


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
        raise TaskError(f"there is no folder {folder}", "give a folder with one .jsonl file a task")
    files = _files(folder)
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


def _files(folder: Path) -> dict[str, Path]:
    """The .jsonl files of a folder, by the plain names of their tasks."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        other = files.setdefault(_plain(path.stem), path)
        if other is not path:
            raise TaskError(f"{other} and {path.name} are files of one task", "remove or rename one of them")
    if not files:
        raise TaskError(f"no .jsonl file in {folder}", "give a folder with one .jsonl file a task")
    return files


def compare_tasks(run: TaskRun, other: TaskRun | None) -> tuple[TaskResult, ...]:
    """Add the difference from the other model to each result of a run; None: the results as they are.

    The standard error is that of the mean of the examples' differences: models that fail on the same examples differ
    by less than their own standard errors say.

    Raises:
        TaskError: the runs are on different examples.
    """
    if other is None:
        return run.results
    other_results = {(result.task, result.metric): result for result in other.results}
    results = []
    for result in run.results:
        key = (result.task, result.metric)
        if len(other.by_example.get(key, ())) != result.examples:
            raise TaskError(
                f"task {result.task} has other examples than when the model to compare with was measured",
                "measure that model again: with compare, remove the dense-….json files of its cells",
            )
        differences = [
            value - other_value for value, other_value in zip(run.by_example[key], other.by_example[key], strict=True)
        ]
        mean, error = mean_and_standard_error(differences)
        comparison = TaskComparison(value=other_results[key].value, difference=mean, standard_error=error)
        results.append(result.model_copy(update={"against": comparison}))
    return tuple(results)


def earlier_run(results: Sequence[TaskResult]) -> TaskRun | None:
    """The run that gave these results; None: there are none, or one lacks the answer to each example."""
    by_example = {
        (result.task, result.metric): [float(digit) for digit in result.right] for result in results if result.right
    }
    if not results or len(by_example) < len(results):
        return None
    return TaskRun(tuple(result.model_copy(update={"against": None}) for result in results), by_example)


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
    examples: list[dict[str, Any]] = []
    fields: dict[str, type] | None = None
    check_regular(path, TaskError)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # a text may hold other line ends
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
    """Describe the first error of an example; None: it has none."""
    if not isinstance(example, dict):
        return "is not an object"
    for name, kind in fields.items():
        if name not in example:
            return f"has no {name}"
        value = example[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {type(value).__name__}, not {kind.__name__}"
        if isinstance(value, list) and (
            len(value) < 2 or not all(isinstance(choice, str) and choice for choice in value)
        ):
            return f"{name} is not a list of two or more texts"
        if kind is str and not value:
            return f"{name} is empty"
    choices = next(example[name] for name, kind in fields.items() if kind is list)
    if not 0 <= example["gold"] < len(choices):
        return f"gold is {example['gold']}, with {len(choices)} choices"
    return None
