"""Run tasks through lm-eval. Needs the extra `eval`."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

import lm_eval.api.task
from lm_eval.evaluator import evaluate as evaluate_tasks
from lm_eval.tasks import TaskManager

from llm_barber.errors import HubError, TaskError, first_line
from llm_barber.evaluation.language_model import StreamedLanguageModel
from llm_barber.evaluation.result import TaskResult
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import (
    PAPER_TASKS,
    Task,
    TaskRun,
    continues_sentence,
    lm_eval_version,
    mean_and_standard_error,
)
from llm_barber.progress import Progress

FEWSHOT_SEED = 1234  # lm-eval's default
CHOICE = "multiple_choice"


def run_tasks(
    model: StreamedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    limit: int | None,
    batch_size: int | None,
    progress: Progress,
) -> TaskRun:
    """Run tasks on a model.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        tasks: lm-eval's tasks, or tasks of local files.
        limit: the most examples of each task.
        batch_size: sequences computed together; None: chosen by the device.
        progress: told of each stage.

    Raises:
        TaskError: lm-eval does not know a task, or the task is not multiple choice.
        HubError: a task's data cannot be had.
        ModelError: the model gives NaN or Inf.
    """
    progress.stage(f"tasks {', '.join(task.name for task in tasks)} on {model.source.model}")
    language_model = StreamedLanguageModel(model, tokenizer, batch_size, progress)
    with _quiet():
        loaded = _load(tasks)
        output = evaluate_tasks(
            language_model,
            {"tasks": loaded, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return _collect(output, loaded, {task.name: task for task in tasks})


def _collect(output: Mapping[str, Any], names: Iterable[str], tasks: Mapping[str, Task]) -> TaskRun:
    """Results of a run, and the value of every example, from lm-eval's output.

    Args:
        output: of lm-eval's `evaluate`.
        names: of the tasks that were run; a group runs several.
        tasks: by the names that the user gave.
    """
    results = []
    by_example: dict[tuple[str, str], list[float]] = {}
    for name in names:
        samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
        for metric in [key for key, value in samples[0].items() if key in samples[0]["metrics"] and _is_number(value)]:
            values = [float(sample[metric]) for sample in samples]
            mean, error = mean_and_standard_error(values)
            by_example[name, metric] = values
            task = tasks.get(name)
            results.append(
                TaskResult(
                    task=name,
                    metric=metric,
                    value=mean,
                    standard_error=error,
                    examples=len(values),
                    shots=output["n-shot"][name],
                    source=task.file.name
                    if task and task.file
                    else f"{lm_eval_version()}, version {output['versions'][name]}",
                    sha256=task.sha256 if task else None,
                    against=None,
                    right="".join(f"{value:.0f}" for value in values) if set(values) <= {0.0, 1.0} else None,
                )
            )
    return TaskRun(tuple(results), by_example)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse tasks that lm-eval does not know, unless a local file has their examples.

    Raises:
        TaskError: lm-eval does not know a task; the hint has similar names.
    """
    for task in tasks:
        if task.examples is None and not _manager(True).match_tasks([task.name]):
            close = get_close_matches(task.name, _manager(True).all_tasks, n=5, cutoff=0.7)
            raise TaskError(
                f"lm-eval has no task {task.name}",
                (f"close: {', '.join(close)}; " if close else "")
                + f"paper is {', '.join(PAPER_TASKS)}; all: `lm-eval ls tasks`",
            )


@cache
def _manager(include_defaults: bool) -> Any:
    """lm-eval's loader, made once: with lm-eval's default tasks it reads some 15,000 files."""
    with _quiet():
        return TaskManager(include_defaults=include_defaults)


def _load(tasks: Sequence[Task]) -> dict[str, Any]:
    """lm-eval's task objects, by name; a group of tasks gives all its tasks.

    Raises:
        TaskError: lm-eval does not know a task, or the task is not multiple choice.
        HubError: a task's data cannot be loaded.
    """
    check_names(tasks)
    loaded: dict[str, Any] = {}
    for task in tasks:
        try:
            specification = task.name if task.examples is None else _configuration(task)
            members = _manager(task.examples is None).load([specification])["tasks"]
        except Exception as error:  # data sets raise whatever their parts raise
            raise HubError(
                f"task {task.name} could not be loaded ({type(error).__name__}: {first_line(error)})",
                "check the connection, or give --tasks-folder a folder of .jsonl files",
            ) from error
        for name, member in members.items():
            if member.get_config("output_type") != CHOICE:
                raise TaskError(f"task {name} is not multiple choice", "choose tasks with given answers")
            if member.get_config("num_fewshot") is None:
                member.set_config(key="num_fewshot", value=0)
            member.set_fewshot_seed(seed=FEWSHOT_SEED)
            loaded[name] = member
    return loaded


def _configuration(task: Task) -> dict[str, Any]:
    """lm-eval's configuration of a task of a local file."""
    from datasets import Dataset

    examples = task.examples
    assert examples is not None
    beginnings = "continuation" in examples[0]
    question = "{{query}}" if continues_sentence(task.name) else "{{query}}\nAnswer:"
    metrics = ["acc"] if beginnings else ["acc", "acc_norm"]
    return {
        "task": task.name,
        "dataset_path": "local",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(examples)},
        "test_split": "test",
        "output_type": CHOICE,
        "doc_to_text": "gold" if beginnings else question,
        "doc_to_choice": "context_options" if beginnings else "choices",
        "doc_to_target": "continuation" if beginnings else "gold",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's progress bars and notes, which would interrupt this program's."""
    bar = lm_eval.api.task.tqdm
    logger = logging.getLogger("lm_eval")
    level = logger.level
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
