"""Perplexity and tasks of a checkpoint, and how far its predictions are from another's."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llm_barber.errors import ModelError
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import TaskResult, TaskRun, compare_tasks, find_tasks
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.loading.opening import check_positions, check_vocabulary, load_tokenizer
from llm_barber.model.device import resolve_batch_size, resolve_device, resolve_dtype
from llm_barber.progress import Progress, Silent
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.text.calibration import read_text
from llm_barber.text.windows import beginning_of_texts, tokens_of
from llm_barber.usage import versions

SAMPLE_CHARACTERS = 5000  # of a text that both tokenizers are tried on


class TextComparison(BaseModel):
    """Against another model: its perplexity, and the ratio of ours to it.

    Per token: `divergence`, the mean Kullback-Leibler divergence of our next-token distribution from its (nats), and
    `top_agreement`, the share of tokens with the same most likely next token.
    """

    model_config = ConfigDict(frozen=True)

    perplexity: float
    perplexity_ratio: float
    divergence: float
    top_agreement: float


class TextResult(BaseModel):
    """Perplexity on one text, with everything that the number depends on.

    `begins_with_bos`: each window does, or with what else the tokenizer puts in front of texts.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    perplexity: float
    windows: int
    seqlen: int
    begins_with_bos: bool
    sha256: str
    against: TextComparison | None


class Evaluation(BaseModel):
    """What `evaluate` found."""

    model_config = ConfigDict(frozen=True)

    model: str
    against: str | None
    device: str
    dtype: str
    versions: dict[str, str]
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...] = ()


@dataclass(frozen=True)
class _Text:
    """A text, ready: its windows, int64 (windows, seqlen)."""

    name: str
    sha256: str
    windows: Tensor
    begins_with_bos: bool


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Perplexity as the field measures it, and zero-shot tasks through lm-eval.

    Perplexity: windows without overlap, mean over all tokens but each window's first. Models are computed decoder layer
    by decoder layer.

    Raises:
        SettingsError: an unknown device or dtype.
        ModelError: a model that cannot be read or computed, or two that do not share a vocabulary.
        CalibrationError: a text that is unknown or shorter than a window.
        TaskError: a task that is unknown or whose file is wrong, or lm-eval is not installed.
        HubError: the hub is needed and cannot be reached.
    """
    progress = progress or Silent()
    return Evaluator(config, progress).measure(config.model, progress)


class Evaluator:
    """Texts and tasks made ready once, to measure any number of models that share a tokenizer.

    What the other model (`against`) predicts is computed once, and kept as its last hidden states.

    Args:
        config: the settings; texts and tasks are tokenised for `config.model`.
        progress: told of each stage.

    Raises:
        BarberError: as `evaluate`.
    """

    def __init__(self, config: EvaluateConfig, progress: Progress) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.tasks = find_tasks(config.tasks, config.tasks_folder, config.limit)
        if self.tasks:  # what is wrong with them is told before texts are measured
            from llm_barber.evaluation.harness import check_names  # lm-eval is optional, and slow to import

            check_names(self.tasks)
        progress.stage(f"opening {config.model}")
        model = StreamedModel(config.model, self.device, self.dtype, config.structure)
        self.other = None
        if config.against is not None:
            self.other = StreamedModel(config.against, self.device, self.dtype, config.structure)
        if self.other is not None:
            _check_same_vocabulary(model, self.other)
        self.tokenizer = load_tokenizer(model.source.folder)
        if self.tokenizer is None:
            raise ModelError(f"{config.model} has no tokenizer, which a text needs", "add its tokenizer files")
        if config.texts:
            check_positions(model.config, config.seqlen)
        if self.other is not None:
            _check_same_tokens(self.tokenizer, self.other)
        self.texts = [self._text(name, model, progress) for name in config.texts]
        self._other_states: dict[str, list[Tensor]] = {}
        self._other_tasks: TaskRun | None = None

    def measure(self, model: str, progress: Progress, with_tasks: bool = True) -> Evaluation:
        """Measure one model; on the tasks, too, unless told not to.

        Raises:
            ModelError: it cannot be read or computed.
            TaskError: a task cannot be run.
        """
        streamed = StreamedModel(model, self.device, self.dtype, self.config.structure)
        if self.other is not None:
            _check_same_vocabulary(streamed, self.other)
        texts = tuple(self._measure_text(streamed, text, progress) for text in self.texts)
        tasks: tuple[TaskResult, ...] = ()
        if self.tasks and with_tasks:
            if self.other is not None and self._other_tasks is None:
                self._other_tasks = self._run_tasks(self.other, progress)
            known = self._other_tasks if self._is_other(streamed) else None
            tasks = compare_tasks(known or self._run_tasks(streamed, progress), self._other_tasks)
        return Evaluation(
            model=model,
            against=self.config.against,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            versions=versions(),
            texts=texts,
            tasks=tasks,
        )

    def _text(self, name: str, model: StreamedModel, progress: Progress) -> _Text:
        progress.stage(f"reading text {name}")
        assert self.tokenizer is not None
        text = evaluation_text(name)
        windows = evaluation_windows(
            name, text, self.tokenizer, self.config.seqlen, self.config.windows, self.config.bos
        )
        check_vocabulary(model.config, windows)
        beginning = torch.tensor(beginning_of_texts(self.tokenizer))
        begins_with_bos = len(beginning) > 0 and bool((windows[:, : len(beginning)] == beginning).all())
        return _Text(name, hashlib.sha256(text.encode()).hexdigest(), windows, begins_with_bos)

    def _states(self, model: StreamedModel, windows: Tensor, progress: Progress) -> list[Tensor]:
        """Last hidden states, (tokens, hidden), of each window."""
        size = resolve_batch_size(self.config.batch_size, windows.shape[1], windows.shape[0], self.device)
        batches = model.hidden_states(torch.split(windows, size), progress)
        return [window for batch in batches for window in batch]

    def _measure_text(self, model: StreamedModel, text: _Text, progress: Progress) -> TextResult:
        others: list[Tensor] | None = None
        if self.other is not None:
            if text.name not in self._other_states:
                self._other_states[text.name] = self._states(self.other, text.windows, progress)
            others = self._other_states[text.name]
        known = others if self._is_other(model) else None
        states = known or self._states(model, text.windows, progress)
        loss = other_loss = divergence = agreement = 0.0
        progress.start("measuring predictions", len(states))
        for index, window in enumerate(text.windows.to(self.device)):
            where = f"window {index} of {text.name}"
            for start in range(0, len(window) - 1, model.positions_at_once):
                part = slice(start, min(start + model.positions_at_once, len(window) - 1))
                following = window[1:][part].unsqueeze(1)
                logits = model.logits(states[index][part], where)
                mass = logits.logsumexp(1)
                loss += _loss(logits, mass, following)
                if self.other is None or others is None:
                    continue
                reference = self.other.logits(others[index][part], where)
                top = reference.amax(1, keepdim=True)
                # The same token is the most likely one of both; finding its number would take ten times as long.
                same = (reference == top) & (logits == logits.amax(1, keepdim=True))
                agreement += same.any(1).sum().item()
                weights = (reference - top).exp_()
                total = weights.sum(1)
                other_mass = top.squeeze(1) + total.log()
                other_loss += _loss(reference, other_mass, following)
                # Σ p (log p − log q), with log p = reference − its mass, p = weights / their total: one product.
                distance = torch.linalg.vecdot(weights, reference.sub_(logits)) / total - (other_mass - mass)
                divergence += distance.double().sum().item()
            progress.advance("")
        count = text.windows.shape[0] * (text.windows.shape[1] - 1)
        compared = None
        if others is not None:
            compared = TextComparison(
                perplexity=_perplexity(other_loss / count, f"the other model on {text.name}"),
                perplexity_ratio=_perplexity((loss - other_loss) / count, f"the ratio on {text.name}"),
                divergence=divergence / count,
                top_agreement=agreement / count,
            )
        return TextResult(
            text=text.name,
            perplexity=_perplexity(loss / count, text.name),
            windows=text.windows.shape[0],
            seqlen=text.windows.shape[1],
            begins_with_bos=text.begins_with_bos,
            sha256=text.sha256,
            against=compared,
        )

    def _is_other(self, model: StreamedModel) -> bool:
        """Is it the model that it is compared with, of which all is known?"""
        return self.other is not None and model.source.folder == self.other.source.folder

    def _run_tasks(self, model: StreamedModel, progress: Progress) -> TaskRun:
        from llm_barber.evaluation.harness import run_tasks  # lm-eval is optional, and slow to import

        return run_tasks(model, self.tokenizer, self.tasks, self.config.limit, self.config.batch_size, progress)


def _loss(logits: Tensor, mass: Tensor, following: Tensor) -> float:
    """Sum of −log p of the following tokens, int64 (positions, 1); `mass` is the logits' logsumexp."""
    return (mass - logits.gather(1, following).squeeze(1)).double().sum().item()


def _perplexity(loss: float, where: str) -> float:
    """The exponential of a mean loss in nats.

    Raises:
        ModelError: it has no number.
    """
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise ModelError(
            f"perplexity of {where} overflows: its mean loss is {loss:.4g} nats a token",
            "the model is broken; a uniform guess has log(vocabulary)",
        ) from error


def _check_same_tokens(tokenizer: Any, other: StreamedModel) -> None:
    """Refuse another model whose tokenizer cuts a text otherwise: ids that mean different words cannot be compared."""
    theirs = load_tokenizer(other.source.folder)
    sample = read_text("builtin")[:SAMPLE_CHARACTERS]
    if theirs is not None and tokens_of(sample, tokenizer) != tokens_of(sample, theirs):
        raise ModelError(f"{other.source.model} has another tokenizer", "compare models with the same tokenizer")


def _check_same_vocabulary(model: StreamedModel, other: StreamedModel) -> None:
    sizes: list[Any] = [one.config.vocab_size for one in (model, other)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{model.source.model} has a vocabulary of {sizes[0]}, {other.source.model} one of {sizes[1]}",
            "compare models with the same tokenizer",
        )
