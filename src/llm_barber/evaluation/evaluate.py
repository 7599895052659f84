"""Evaluate a checkpoint: perplexity, accuracy on tasks, distance from another model's predictions."""

import hashlib
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from llm_barber.errors import ModelError, TaskError, first_line
from llm_barber.evaluation.predictions import HiddenStates, measure_predictions
from llm_barber.evaluation.result import Evaluation, TaskResult, TextResult
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import compare_tasks, find_tasks
from llm_barber.evaluation.texts import check_text, evaluation_text, evaluation_windows
from llm_barber.loading.configuration import check_positions
from llm_barber.loading.opening import warn_of_lacking_buffers
from llm_barber.loading.same_tokens import check_same_tokenizer, check_same_vocabulary
from llm_barber.loading.tokenizer import check_vocabulary, load_tokenizer
from llm_barber.model.device import resolve_batch_size, resolve_device, resolve_dtype
from llm_barber.progress import Progress, Silent
from llm_barber.settings.base import takes
from llm_barber.settings.compare import EvaluateConfig
from llm_barber.text.windows import beginning_of_texts
from llm_barber.usage import versions


@dataclass(frozen=True)
class TokenisedText:
    """A text, ready to measure: its windows are token ids, int64, (windows, seqlen)."""

    name: str
    sha256: str
    windows: Tensor
    begins_with_bos: bool


@takes(EvaluateConfig)
def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Measure perplexity on windows without overlap, and multiple-choice tasks through lm-eval.

    Perplexity: exp of the mean of −log p over all tokens except each window's first. Models are computed decoder
    layer by decoder layer.

    Raises:
        SettingsError: the device or the dtype is unknown.
        ModelError: a model cannot be read or computed, or two models do not share a vocabulary.
        CalibrationError: a text is unknown or shorter than a window.
        TaskError: a task is unknown, its file is wrong, or lm-eval is not installed.
        HubError: the hub is needed and cannot be reached.
    """
    progress = progress or Silent()
    evaluator = Evaluator(config, progress)
    evaluation = evaluator.measure(config.model, progress)
    if evaluator.other is None or not evaluation.tasks:
        return evaluation
    same_model = evaluator.other is evaluator.model
    other_tasks = evaluation.tasks if same_model else evaluator.run_tasks(evaluator.other, progress)
    return evaluation.model_copy(update={"tasks": compare_tasks(evaluation.tasks, other_tasks)})


class Evaluator:
    """Texts and tasks, prepared once to measure any number of models that share a tokenizer.

    The predictions of the other model (`against`) on texts are computed once, and kept as its last hidden states.

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
        if self.tasks:  # wrong tasks are reported before texts are measured
            _import_harness().check_names(self.tasks)
        for name in config.texts:  # before a model is downloaded
            check_text(name)
        progress.stage(f"opening {config.model}")
        self.other: StreamedModel | None = None
        self._other_states: dict[str, HiddenStates] = {}
        if config.against is not None:
            self.other = self._open(config.against, progress)
        self.model = self._open(config.model, progress)
        self.tokenizer = load_tokenizer(self.model.source.folder)
        if self.tokenizer is None:
            raise ModelError(f"{config.model} has no tokenizer, which a text needs", "add its tokenizer files")
        if config.texts:
            check_positions(self.model.config, config.seqlen)
        if self.other is not None:
            check_same_tokenizer(self.tokenizer, self.other.source.model, self.other.source.folder)
        self.texts = [self._tokenise(name, progress) for name in config.texts]

    def measure(self, model: str, progress: Progress, with_tasks: bool = True) -> Evaluation:
        """Measure one model on the texts and, unless `with_tasks` is False, on the tasks.

        Results of tasks are not compared with those of the other model.

        Raises:
            ModelError: the model cannot be read or computed.
            TaskError: a task cannot be run.
        """
        streamed = self.model if model == self.config.model else self._open(model, progress)
        return Evaluation(
            model=model,
            against=self.config.against,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            versions=versions(),
            texts=tuple(self._measure_text(streamed, text, progress) for text in self.texts),
            tasks=self.run_tasks(streamed, progress) if self.tasks and with_tasks else (),
        )

    def run_tasks(self, model: StreamedModel, progress: Progress) -> tuple[TaskResult, ...]:
        """Run the tasks on a model.

        Raises:
            TaskError: a task cannot be run.
        """
        results: tuple[TaskResult, ...] = _import_harness().run_tasks(
            model, self.tokenizer, self.tasks, self.config.limit, self.config.batch_size, progress
        )
        return results

    def _open(self, model: str, progress: Progress) -> StreamedModel:
        if self.other is not None and model == self.config.against:
            return self.other
        streamed = StreamedModel(model, self.device, self.dtype, self.config.structure)
        if self.other is not None:
            check_same_vocabulary(streamed.source.model, streamed.config, self.other.source.model, self.other.config)
        warn_of_lacking_buffers(streamed.skeleton.model, streamed.source, progress)
        return streamed

    def _tokenise(self, name: str, progress: Progress) -> TokenisedText:
        progress.stage(f"reading text {name}")
        assert self.tokenizer is not None
        text = evaluation_text(name)
        windows = evaluation_windows(
            name, text, self.tokenizer, self.config.seqlen, self.config.windows, self.config.bos
        )
        check_vocabulary(self.model.config, windows)
        beginning = torch.tensor(beginning_of_texts(self.tokenizer))
        begins_with_bos = len(beginning) > 0 and bool((windows[:, : len(beginning)] == beginning).all())
        return TokenisedText(name, hashlib.sha256(text.encode()).hexdigest(), windows, begins_with_bos)

    def _measure_text(self, model: StreamedModel, text: TokenisedText, progress: Progress) -> TextResult:
        other = None if self.other is None else self._states(self.other, text, progress)
        states = self._states(model, text, progress)
        windows = text.windows.to(self.device)
        perplexity, comparison = measure_predictions(text.name, windows, states, other, progress)
        return TextResult(
            text=text.name,
            perplexity=perplexity,
            windows=windows.shape[0],
            seqlen=windows.shape[1],
            begins_with_bos=text.begins_with_bos,
            sha256=text.sha256,
            against=comparison,
        )

    def _states(self, model: StreamedModel, text: TokenisedText, progress: Progress) -> HiddenStates:
        """The last hidden states of each window of a text; the other model's are kept."""
        kept = self._other_states if model is self.other else {}
        if text.name not in kept:
            count, seqlen = text.windows.shape
            size = resolve_batch_size(self.config.batch_size, seqlen, count, self.device)
            batches = model.hidden_states(torch.split(text.windows, size), progress)
            kept[text.name] = HiddenStates(model, [window for batch in batches for window in batch])
        return kept[text.name]


def _import_harness() -> ModuleType:
    """Import `harness.py` when a task needs it: lm-eval is optional, and slow to import.

    Raises:
        TaskError: lm-eval cannot be imported.
    """
    try:
        return import_module("llm_barber.evaluation.harness")
    except ImportError as error:
        raise TaskError(
            f"tasks need lm-eval, which cannot be imported: {first_line(error)}", "pip install 'lm-eval>=0.4.13'"
        ) from error
