"""Tasks through lm-eval, with a model that is computed decoder layer by decoder layer. Needs the extra `eval`."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from llm_barber.errors import HubError, TaskError, first_line
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import CONTINUED, PAPER_TASKS, Task, TaskResult, TaskRun, mean_and_standard_error
from llm_barber.loading.opening import check_vocabulary
from llm_barber.model.device import resolve_batch_size
from llm_barber.progress import Progress
from llm_barber.text.windows import tokens_of

try:
    import lm_eval.api.task
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as evaluate_tasks
    from lm_eval.tasks import TaskManager
except ImportError as import_error:
    raise TaskError(
        f"tasks need lm-eval, which cannot be imported: {first_line(import_error)}", "pip install 'llm-barber[eval]'"
    ) from import_error

# Activations kept at once; more requests take another pass over the model's layers.
PASS_BYTES = 2**30
FEWSHOT_SEED = 1234  # lm-eval's own
CHOICE = "multiple_choice"
Tokens = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]


class StreamedLanguageModel(TemplateLM):  # type: ignore[misc]
    """What lm-eval asks log-likelihoods of."""

    def __init__(self, model: StreamedModel, tokenizer: Any, batch_size: int | None, progress: Progress) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.asked_batch_size = batch_size
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise TaskError(
                "the model's tokenizer has no token that ends a text, which tasks need",
                "add eos_token to tokenizer_config.json",
            )
        return end

    @cached_property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @cached_property
    def max_length(self) -> int:
        """Positions of the model."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless told."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tokens_of(string, self.tokenizer, **special)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives."""
        result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return result

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        # The continuation's last token is predicted, not read. Requests that read the same tokens share them.
        readers: dict[Tokens, list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            check_vocabulary(self.model.config, torch.tensor(context + continuation))
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            readers.setdefault(tokens, []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        passes = list(self._passes(sorted(readers, key=len, reverse=True)))
        for batches in passes:
            states = self.model.hidden_states([_padded(batch) for batch in batches], self.progress)
            for batch, hidden in zip(batches, states, strict=True):
                answers |= self._score(batch, hidden, readers, requests)
        return [answers[number] for number in range(len(requests))]

    def _passes(self, sequences: Sequence[Tokens]) -> Iterator[list[list[Tokens]]]:
        """Batches of sequences of about one length, as many at once as their activations may take memory."""
        room = max(1, PASS_BYTES // (self.model.config.hidden_size * self.model.skeleton.dtype.itemsize))
        batches: list[list[Tokens]] = []
        used = start = 0
        while start < len(sequences):
            length = len(sequences[start])
            size = resolve_batch_size(self.asked_batch_size, length, len(sequences) - start, self.model.skeleton.device)
            batch = list(sequences[start : start + size])
            if batches and used + len(batch) * length > room:
                yield batches
                batches, used = [], 0
            batches.append(batch)
            used += len(batch) * length
            start += size
        if batches:
            yield batches

    def _score(
        self,
        batch: Sequence[Tokens],
        hidden: Tensor,
        readers: Mapping[Tokens, list[int]],
        requests: Sequence[Request],
    ) -> dict[int, tuple[float, bool]]:
        """Answers to the requests that read a batch, by their numbers; `hidden` is (sequences, tokens, hidden).

        A continuation of k tokens is predicted by the last k positions of what was read.
        """
        rows: list[Tensor] = []
        wanted: list[int] = []
        owners: list[tuple[int, int]] = []
        for tokens, states in zip(batch, hidden, strict=True):
            for number in readers[tokens]:
                continuation = requests[number][2][-len(tokens) :]
                rows.append(states[len(tokens) - len(continuation) : len(tokens)])
                wanted += continuation
                owners.append((number, len(continuation)))
        following = torch.tensor(wanted, device=self.model.skeleton.device).unsqueeze(1)
        found: list[float] = []
        greedy: list[bool] = []
        size = self.model.positions_at_once
        for part, tokens_part in zip(torch.split(torch.cat(rows), size), torch.split(following, size), strict=True):
            logits = self.model.logits(part, "a task")
            found += (logits.gather(1, tokens_part).squeeze(1) - logits.logsumexp(1)).tolist()
            greedy += (logits.argmax(1, keepdim=True) == tokens_part).squeeze(1).tolist()
        answers = {}
        start = 0
        for number, length in owners:
            end = start + length
            answers[number] = (math.fsum(found[start:end]), all(greedy[start:end]))
            start = end
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Not asked for: perplexity is measured by `evaluate --text`."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Not asked for: such tasks are refused before."""
        raise NotImplementedError


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
        tokenizer: its tokenizer.
        tasks: lm-eval's, or with examples of their own.
        limit: examples of each task, at most.
        batch_size: sequences computed together; None: chosen by the device.
        progress: told of each stage.

    Raises:
        TaskError: lm-eval does not know a task, or it is not multiple choice.
        HubError: a task's data cannot be had.
        ModelError: the model gives NaN or Inf.
    """
    progress.stage(f"tasks {', '.join(task.name for task in tasks)} on {model.source.model}")
    language_model = StreamedLanguageModel(model, tokenizer, batch_size, progress)
    with _quiet():
        loaded = _load(tasks)
        found = evaluate_tasks(
            language_model,
            {"tasks": loaded, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    results = []
    by_example: dict[tuple[str, str], list[float]] = {}
    given = {task.name: task for task in tasks}
    for name in loaded:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        for metric in [key for key, value in samples[0].items() if key in samples[0]["metrics"] and _number(value)]:
            values = [float(sample[metric]) for sample in samples]
            mean, error = mean_and_standard_error(values)
            by_example[name, metric] = values
            task = given.get(name)
            results.append(
                TaskResult(
                    task=name,
                    metric=metric,
                    value=mean,
                    standard_error=error,
                    examples=len(values),
                    shots=found["n-shot"][name],
                    source=task.file.name if task and task.file else f"lm-eval, version {found['versions'][name]}",
                    sha256=task.sha256 if task else None,
                    against=None,
                )
            )
    return TaskRun(tuple(results), by_example)


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse tasks that lm-eval does not know; local ones need not be known.

    Raises:
        TaskError: it does not know one.
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
def _manager(known: bool) -> Any:
    """lm-eval's loader, made once: with all the tasks that it knows it reads some 15,000 files."""
    with _quiet():
        return TaskManager(include_defaults=known)


def _load(tasks: Sequence[Task]) -> dict[str, Any]:
    """lm-eval's task objects, by name; groups give all of theirs."""
    check_names(tasks)
    loaded: dict[str, Any] = {}
    for task in tasks:
        try:
            part = _manager(task.examples is None).load([task.name if task.examples is None else _configuration(task)])[
                "tasks"
            ]
        except Exception as error:  # data sets raise whatever their parts raise
            raise HubError(
                f"task {task.name} could not be loaded ({type(error).__name__}: {first_line(error)})",
                "check the connection, or give --tasks-folder a folder of .jsonl files",
            ) from error
        for name, one in part.items():
            if one.get_config("output_type") != CHOICE:
                raise TaskError(f"task {name} is not multiple choice", "choose tasks with given answers")
            if one.get_config("num_fewshot") is None:
                one.set_config(key="num_fewshot", value=0)
            one.set_fewshot_seed(seed=FEWSHOT_SEED)
            loaded[name] = one
    return loaded


def _configuration(task: Task) -> dict[str, Any]:
    """lm-eval's configuration of a local task."""
    from datasets import Dataset

    examples = task.examples
    assert examples is not None
    beginnings = "continuation" in examples[0]
    question = "{{query}}" if task.name in CONTINUED else "{{query}}\nAnswer:"
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


def _padded(batch: Sequence[Tokens]) -> Tensor:
    """int64, (sequences, tokens): zeros after the shorter ones, which causal attention does not look at."""
    rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's own bars and notes, which would cut through ours."""
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
