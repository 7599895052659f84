"""Generate text with a model, dense or pruned, and say how fast it was; in turn with another model, if wanted.

transformers' `generate` chooses the tokens; a streamer notes when each comes.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, TextStreamer
from transformers.utils import logging

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.configuration import load_config, load_generation_config
from llm_barber.loading.same_tokens import check_same_tokenizer, check_same_vocabulary
from llm_barber.loading.tokenizer import check_vocabulary
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.runtime.load import load
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.settings.base import takes
from llm_barber.settings.tools import GenerateConfig, KeepPacked
from llm_barber.tools.generation import GeneratedText, Generation, Speed
from llm_barber.tools.prompt import open_tokenizer, prompt_tokens, read_prompt, room_for_text
from llm_barber.usage import current_memory, machine, peak_device_memory, peak_memory, reset_peak_memory, versions

WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 3  # most tokens of the prompt, and new tokens, before anything is timed
TIMED_TOKENS = 32  # most new tokens of a round of timing

OnText = Callable[[str], None]


@takes(GenerateConfig)
def generate(config: GenerateConfig, progress: Progress | None = None, on_text: OnText | None = None) -> Generation:
    """Let a model continue a prompt, and measure its speed and memory; with `against`, another model's, too.

    A model is warmed up before anything is timed. Two models are loaded and write one after the other; then they are
    timed in turn, on as many tokens each: at most 32, or as many as the first model's text has.

    Args:
        config: the settings.
        progress: told of each stage, and of new tokens where there is no `on_text`.
        on_text: called with each piece of the text of `config.model` as it is written.

    Raises:
        SettingsError: the device is unknown, standard input has no prompt, or `chat` has no template.
        ModelError: a model or its tokenizer cannot be read, the prompt does not fit, two models do not share a
            vocabulary, or logits are NaN or Inf.
        HubError: the hub cannot be reached.
        KeyboardInterrupt: Ctrl-C before the first token; later the result says so.
    """
    progress = progress or Silent()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    opened = [_open(config.model, config.keep_packed, progress)]
    if config.against is not None:
        opened.append(_open(config.against, KeepPacked.NO, progress))
    tokenizer = open_tokenizer(config.model, opened[0].source.folder)
    for against in opened[1:]:
        check_same_vocabulary(opened[0].name, opened[0].config, against.name, against.config)
        check_same_tokenizer(tokenizer, against.name, against.source.folder)
    tokens, chat = prompt_tokens(read_prompt(config.prompt, progress), tokenizer, config)
    check_vocabulary(opened[0].config, tokens)
    room = room_for_text((model.config for model in opened), tokens.shape[1], config.max_new_tokens, progress)
    task = _Task(tokens, tokenizer, room, config, device, dtype)
    with _quiet_libraries():
        results, interrupted = _write_and_time(task, opened, progress, on_text)
    return Generation(
        generated=results[0],
        against=results[1] if len(results) > 1 else None,
        chat=chat,
        prompt_tokens=tokens.shape[1],
        interrupted=interrupted,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        machine=machine(device),
        versions=versions(),
    )


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that was checked, and whose weights are not loaded yet; `config` is the language model's part."""

    source: CheckpointSource
    config: PreTrainedConfig
    keep_packed: KeepPacked

    @property
    def name(self) -> str:
        """The model, as it was named."""
        return self.source.model


@dataclass(frozen=True)
class _Task:
    """A prompt's token ids, int64, (1, tokens), and all that two models share."""

    tokens: Tensor
    tokenizer: Any
    new_tokens: int
    config: GenerateConfig
    device: torch.device
    dtype: torch.dtype


def _open(model: str, keep_packed: KeepPacked, progress: Progress) -> _Opened:
    """Check what can be checked of a model before its weights are loaded.

    Raises:
        ModelError: it cannot be read, or is no language model.
        HubError: the hub cannot be reached.
    """
    progress.stage(f"opening {model}")
    source = CheckpointSource(model)
    config = load_config(source)
    auto_class(config)
    load_generation_config(source.folder)
    return _Opened(source, config.get_text_config(), keep_packed)


class Clock(TextStreamer):  # type: ignore[misc]
    """Notes each new token and the time when it came, and hands the text on; that takes no time of the clock.

    Args:
        tokenizer: of the model.
        on_text: called with each finished piece of text; None: no text is made.
        on_token: called for each new token.
    """

    def __init__(
        self, tokenizer: Any, on_text: OnText | None = None, on_token: Callable[[], None] | None = None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self._on_text, self._on_token = on_text, on_token
        self._times: list[float] = []  # of the prompt, and of each new token
        self._uncounted = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, (1, tokens), at the first call, then each new token, (1,)."""
        called = time.perf_counter()
        if self._times:
            self.tokens += value.flatten().tolist()
            if self._on_token is not None:
                self._on_token()
        self._times.append(called - self._uncounted)
        if self._on_text is not None:
            super().put(value)
        self._uncounted += time.perf_counter() - called

    def end(self) -> None:
        """Hand out the text that is still kept."""
        if self._on_text is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of text, unless it is empty."""
        if text and self._on_text is not None:
            self._on_text(text)

    def prefill_seconds(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self._times[1] - self._times[0]

    def decode_seconds(self) -> float:
        """Seconds from the first new token to the last."""
        return self._times[-1] - self._times[1]


@dataclass
class _Writer:
    """A loaded model, the tokens that end its texts, the clock of its text, and the memory that it took, bytes."""

    name: str
    model: PreTrainedModel
    ends: frozenset[int]
    text: Clock
    peak_memory: int | None


def _write_and_time(
    task: _Task, opened: list[_Opened], progress: Progress, on_text: OnText | None
) -> tuple[list[GeneratedText], bool]:
    """Each model's result, and whether Ctrl-C ended the work before it was complete."""
    writers: list[_Writer] = []
    finished = True
    for model in opened:
        try:
            writer, finished = _load_and_write(task, model, progress, None if writers else on_text)
        except KeyboardInterrupt:
            if not writers:
                raise
            finished = False
            break
        writers.append(writer)
        if not finished:
            break
    clocks = [[writer.text] for writer in writers]
    if len(writers) > 1 and finished:
        rounds, finished = _time_in_turn(task, writers, progress)
        clocks = [list(of_model) for of_model in zip(*rounds, strict=True)] or clocks
    return [_result(task, *pair) for pair in zip(writers, clocks, strict=True)], not finished


def _load_and_write(task: _Task, opened: _Opened, progress: Progress, on_text: OnText | None) -> tuple[_Writer, bool]:
    """Load a model, warm it up, and let it write its text; False if Ctrl-C ended the text.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first token.
    """
    on_gpu = task.device.type == "cuda"
    before = torch.cuda.memory_allocated(task.device) if on_gpu else current_memory()
    model = _load(task, opened, progress)
    reset_peak_memory()  # while a shard is read its pages count as the process's, which the system can take back
    ends = _ends(model, task.tokenizer, opened.name)
    progress.stage(f"warming up {opened.name}")
    _warm_up(model, task.tokens[:, :WARM_UP_PROMPT], opened.name)
    if on_text is None:
        progress.start(f"{opened.name} writes", task.new_tokens)
    clock = Clock(task.tokenizer, on_text, None if on_text is not None else lambda: progress.advance(""))
    temperature = task.config.temperature
    drawing: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = _settings(task.new_tokens, ends, **(drawing if temperature else {}))
    with torch.random.fork_rng(devices=[task.device] if on_gpu else []):
        torch.manual_seed(task.config.seed)
        finished = _decode(model, task.tokens, settings, clock)
    if not clock.tokens:
        raise KeyboardInterrupt
    peak = peak_device_memory(task.device) if on_gpu else peak_memory() if sys.platform == "linux" else None
    return _Writer(opened.name, model, ends, clock, None if peak is None else peak - before), finished


def _load(task: _Task, opened: _Opened, progress: Progress) -> PreTrainedModel:
    """Load a model; its warnings go to the progress."""
    by_time = opened.keep_packed is KeepPacked.AUTO and task.device.type == "cpu"
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", module=r"llm_barber\.")
        keep_packed: bool | Literal["auto"] = "auto" if by_time else opened.keep_packed is not KeepPacked.NO
        model = load(opened.name, keep_packed, task.dtype, str(task.device), progress=progress)
    for warning in caught:
        progress.warn(str(warning.message))
    return model


def _ends(model: PreTrainedModel, tokenizer: Any, name: str) -> frozenset[int]:
    """Tokens that end a text, by the model's settings of generation, its configuration and its tokenizer.

    Raises:
        ModelError: one of them is no token id.
    """
    ends: set[int] = set()
    for owner in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        for token in [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]:
            if not isinstance(token, int) or token < 0:
                raise ModelError(
                    f"{name} says that its texts end with token {token!r}, which is no token id",
                    "correct eos_token_id in generation_config.json and config.json",
                )
            ends.add(token)
    return frozenset(ends)


def _settings(new_tokens: int, ends: frozenset[int] = frozenset(), **more: Any) -> GenerationConfig:
    """Settings for transformers: the most likely tokens, unless `more` says otherwise; without ends exactly so many."""
    return GenerationConfig(
        **{"do_sample": False, **more},
        max_new_tokens=new_tokens,
        min_new_tokens=None if ends else new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),  # transformers wants one; a single sequence is never padded
    )


def _decode(model: PreTrainedModel, prompt: Tensor, settings: GenerationConfig, clock: Clock) -> bool:
    """Let a model write; returns False if Ctrl-C ended it."""
    model.generation_config = settings  # what is not set here would come from the model's own file
    prompt = prompt.to(model.device)
    try:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=clock)
    except KeyboardInterrupt:
        clock.end()
        return False
    return True


def _warm_up(model: PreTrainedModel, prompt: Tensor, name: str) -> None:
    """Let a model write a few tokens: threads and buffers are made at the first use, and weights come into caches.

    Raises:
        ModelError: logits are NaN or Inf.
    """
    prompt = prompt.to(model.device)
    settings = model.generation_config = _settings(WARM_UP_TOKENS, output_logits=True, return_dict_in_generate=True)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    if not all(torch.isfinite(end) for logits in output.logits for end in torch.aminmax(logits)):
        raise ModelError(
            f"{name} gives NaN or Inf logits for the prompt",
            "compute with a wider range: --dtype bfloat16 or float32; if it was, the model is broken",
        )


def _time_in_turn(task: _Task, writers: list[_Writer], progress: Progress) -> tuple[list[list[Clock]], bool]:
    """Clocks of each complete round, a clock for each model, and whether all rounds are complete."""
    settings = _settings(min(TIMED_TOKENS, task.new_tokens, len(writers[0].text.tokens)))
    rounds: list[list[Clock]] = []
    with suppress(KeyboardInterrupt):
        progress.start("timing in turn", task.config.rounds)
        for number in range(task.config.rounds):
            clocks = [Clock(task.tokenizer) for _ in writers]
            pairs = list(zip(writers, clocks, strict=True))
            for writer, clock in reversed(pairs) if number % 2 else pairs:
                if not _decode(writer.model, task.tokens, settings, clock):
                    return rounds, False
            rounds.append(clocks)
            progress.advance("")
        return rounds, True
    return rounds, False


def _result(task: _Task, writer: _Writer, clocks: list[Clock]) -> GeneratedText:
    tokens, after_first = writer.text.tokens, len(clocks[0].tokens) - 1
    prefill = Speed(tokens=task.tokens.shape[1], seconds=tuple(clock.prefill_seconds() for clock in clocks))
    decoding = Speed(tokens=after_first, seconds=tuple(clock.decode_seconds() for clock in clocks))
    parts = [*writer.model.parameters(), *writer.model.buffers()]
    modules = list(writer.model.modules())
    packed = sum(isinstance(module, PackedLinear) for module in modules)
    return GeneratedText(
        model=writer.name,
        text=task.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tuple(tokens),
        ended=tokens[-1] in writer.ends,
        prefill=prefill,
        decode=decoding if after_first else None,
        weight_bytes=sum(part.numel() * part.element_size() for part in parts),
        peak_memory=writer.peak_memory,
        linears=sum(isinstance(module, nn.Linear) for module in modules) + packed,
        packed_linears=packed,
    )


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what transformers and others log and warn of off the screen."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
