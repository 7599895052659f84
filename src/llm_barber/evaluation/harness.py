"""Run tasks through lm-eval, with a streamed model as its language model. Needs the extra `eval`."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, cached_property, partialmethod
from typing import Any

import lm_eval.api.task
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as evaluate_tasks
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_barber.errors import HubError, TaskError, first_line
from llm_barber.evaluation.predictions import token_losses
from llm_barber.evaluation.result import TaskResult
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import (
    PAPER_TASKS,
    Task,
    continues_sentence,
    lm_eval_version,
    mean_and_standard_error,
)
from llm_barber.loading.tokenizer import check_vocabulary
from llm_barber.model.device import resolve_batch_size
from llm_barber.progress import Progress
from llm_barber.text.windows import tokens_of

FEWSHOT_SEED = 1234  # lm-eval's default
CHOICE = "multiple_choice"
PASS_BYTES = 2**30  # of activations in memory; more requests take another pass over the model's layers
Tokens = tuple[int, ...]
Answer = tuple[float, bool]  # log-likelihood of a continuation, and True where greedy decoding gives it


def run_tasks(
    model: StreamedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    limit: int | None,
    batch_size: int | None,
    progress: Progress,
) -> tuple[TaskResult, ...]:
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
    with _quiet():
        loaded = _load(tasks)
        output = evaluate_tasks(
            StreamedLanguageModel(model, tokenizer, batch_size, progress),
            {"tasks": loaded, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    by_name = {task.name: task for task in tasks}
    return tuple(result for name in loaded for result in _results(output, name, by_name.get(name)))


def _results(output: Mapping[str, Any], name: str, task: Task | None) -> Iterator[TaskResult]:
    """Results of a task from lm-eval's output, one for each metric; `task` is None for a member of a group."""
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    source = f"{lm_eval_version()}, version {output['versions'][name]}"
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if not all(isinstance(value, int | float) for value in values):
            continue
        mean, error = mean_and_standard_error(values)
        yield TaskResult(
            task=name,
            metric=metric,
            value=mean,
            standard_error=error,
            examples=len(values),
            shots=output["n-shot"][name],
            source=task.file.name if task and task.file else source,
            sha256=task.sha256 if task else None,
            against=None,
            right="".join(f"{value:.0f}" for value in values) if set(values) <= {0, 1} else None,
        )


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
        TaskError: the task is not multiple choice.
        HubError: a task's data cannot be loaded.
    """
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


class StreamedLanguageModel(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests for log-likelihoods; requests that read the same tokens share a sequence."""

    loglikelihood = partialmethod(TemplateLM.loglikelihood, disable_tqdm=True)
    loglikelihood_rolling = generate_until = None  # no multiple-choice task asks for them

    def __init__(self, model: StreamedModel, tokenizer: Any, batch_size: int | None, progress: Progress) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.requested_batch_size = batch_size
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            TaskError: the tokenizer has no such token.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise TaskError(
                "the model's tokenizer has no token that ends a text, which tasks need",
                "add eos_token to tokenizer_config.json",
            )
        return end

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without context."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @cached_property
    def max_length(self) -> int:
        """Number of the model's positions."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; None: with special tokens where the tokenizer adds them."""
        return tokens_of(string, self.tokenizer, add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        readers: dict[
            Tokens, list[tuple[int, Tensor]]
        ] = {}  # number and continuation of each request, by what it reads
        for number, (_texts, context, continuation) in enumerate(requests):
            check_vocabulary(self.model.config, torch.tensor(context + continuation))
            # The continuation's last token is predicted, not read.
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            readers.setdefault(tokens, []).append((number, torch.tensor(continuation[-len(tokens) :])))
        answers: dict[int, Answer] = {}
        for batches in self._passes(sorted(readers, key=len, reverse=True)):
            padded = [pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True) for batch in batches]
            all_states = self.model.hidden_states(padded, self.progress)
            self.progress.start("scoring answers", len(batches))
            for batch, hidden in zip(batches, all_states, strict=True):
                answers |= self._score(
                    [
                        (number, states[: len(tokens)][-len(continuation) :], continuation)
                        for tokens, states in zip(batch, hidden, strict=True)
                        for number, continuation in readers[tokens]
                    ]
                )
                self.progress.advance("")
        return [answers[number] for number in range(len(requests))]

    def _passes(self, sequences: Sequence[Tokens]) -> Iterator[list[list[Tokens]]]:
        """Batches of sequences of similar length, for each pass over the layers; its activations fit `PASS_BYTES`.

        Causal attention does not read the padding after shorter sequences.
        """
        room = PASS_BYTES // (self.model.skeleton.dtype.itemsize * self.model.config.hidden_size)  # tokens
        batches: list[list[Tokens]] = []
        used = start = 0
        while start < len(sequences):
            length = len(sequences[start])
            size = resolve_batch_size(
                self.requested_batch_size, length, len(sequences) - start, self.model.skeleton.device
            )
            if batches and used + size * length > room:
                yield batches
                batches, used = [], 0
            batches.append(list(sequences[start : start + size]))
            used += size * length
            start += size
        if batches:
            yield batches

    def _score(self, requests: Sequence[tuple[int, Tensor, Tensor]]) -> dict[int, Answer]:
        """Answers of requests, by their numbers.

        Args:
            requests: number, hidden states that predict the continuation, (k, hidden), and continuation, (k,).
        """
        size = self.model.positions_at_once
        states = torch.cat([states for _, states, _ in requests])
        following = torch.cat([continuation for *_, continuation in requests]).to(self.model.skeleton.device)
        losses, greedy = [], []
        for part, tokens in zip(torch.split(states, size), torch.split(following, size), strict=True):
            logits = self.model.logits(part, "a task")
            losses.append(token_losses(logits, logits.logsumexp(1), tokens))
            greedy.append(logits.argmax(1) == tokens)
        lengths = [len(continuation) for *_, continuation in requests]
        parts = zip(torch.split(torch.cat(losses), lengths), torch.split(torch.cat(greedy), lengths), strict=True)
        return {
            number: (-math.fsum(loss.tolist()), bool(chosen.all()))
            for (number, *_), (loss, chosen) in zip(requests, parts, strict=True)
        }
