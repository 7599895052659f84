"""Generate text with a model, dense or pruned, and say how fast it was; in turn with another model, if wanted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from transformers.utils import logging

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.loading.configuration import load_config, load_generation_config
from llm_barber.loading.same_tokens import check_same_tokenizer, check_same_vocabulary
from llm_barber.loading.tokenizer import check_vocabulary
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress, Silent
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.settings.checked import takes
from llm_barber.settings.generate import GenerateConfig, KeepPacked
from llm_barber.tools.decoding import Clock, decode, settings_of_generation, speeds
from llm_barber.tools.generation import GeneratedText, Generation
from llm_barber.tools.prompt import open_tokenizer, prompt_tokens, read_prompt, room_for_text
from llm_barber.tools.writer import OnText, Opened, Task, TextWriter, load_and_write
from llm_barber.usage import machine, versions

TIMED_TOKENS = 32  # most new tokens of a round of timing


@takes(GenerateConfig)
def generate(config: GenerateConfig, progress: Progress | None = None, on_text: OnText | None = None) -> Generation:
    """Let a model continue a prompt, and measure its speed and memory; with `against`, another model's, too.

    A model is warmed up before anything is timed. Two models are loaded and write one after the other; then they are
    timed in turn, on the same tokens: the first 32 of the first model's text, which are repeated if it is shorter.

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
    _check_same_tokens(opened, tokenizer)
    tokens, chat = prompt_tokens(read_prompt(config.prompt, progress), tokenizer, config)
    check_vocabulary(opened[0].config, tokens)
    room = room_for_text((model.config for model in opened), tokens.shape[1], config.max_new_tokens, progress)
    task = Task(tokens, tokenizer, room, config, device, dtype)
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


def _open(model: str, keep_packed: KeepPacked, progress: Progress) -> Opened:
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
    return Opened(source, config.get_text_config(), keep_packed)


def _check_same_tokens(opened: list[Opened], tokenizer: Any) -> None:
    """Refuse a second model that does not share the first model's tokens."""
    for against in opened[1:]:
        check_same_vocabulary(opened[0].name, opened[0].config, against.name, against.config)
        check_same_tokenizer(tokenizer, against.name, against.source.folder)


def _write_and_time(
    task: Task, opened: list[Opened], progress: Progress, on_text: OnText | None
) -> tuple[list[GeneratedText], bool]:
    """Each model's result, and whether Ctrl-C ended the work before it was complete."""
    writers: list[TextWriter] = []
    interrupted = False
    for model in opened:
        try:
            writer, finished = load_and_write(task, model, progress, None if writers else on_text)
        except KeyboardInterrupt:
            if not writers:
                raise
            interrupted = True
            break
        writers.append(writer)
        if not finished:
            interrupted = True
            break
    clocks = [[writer.text] for writer in writers]
    if len(writers) > 1 and not interrupted:
        rounds, interrupted = _time_in_turn(task, writers, progress)
        clocks = [list(of_model) for of_model in zip(*rounds, strict=True)] or clocks
    return [_result(task, *pair) for pair in zip(writers, clocks, strict=True)], interrupted


def _time_in_turn(task: Task, writers: list[TextWriter], progress: Progress) -> tuple[list[list[Clock]], bool]:
    """Clocks of each complete round, a clock for each model, and whether Ctrl-C ended the timing."""
    count = min(TIMED_TOKENS, task.new_tokens)
    tokens = (writers[0].text.tokens * count)[:count]
    settings = settings_of_generation(count)
    rounds: list[list[Clock]] = []
    with suppress(KeyboardInterrupt):
        progress.start("timing in turn", task.config.rounds)
        for number in range(task.config.rounds):
            clocks = [Clock() for _ in writers]
            pairs = list(zip(writers, clocks, strict=True))
            for writer, clock in reversed(pairs) if number % 2 else pairs:
                if not decode(writer.model, task.tokens, settings, clock, tokens):
                    return rounds, True
            rounds.append(clocks)
            progress.advance("")
        return rounds, False
    return rounds, True


def _result(task: Task, writer: TextWriter, clocks: list[Clock]) -> GeneratedText:
    tokens = writer.text.tokens
    prefill, decoding = speeds(task.tokens.shape[1], clocks)
    parts = [*writer.model.parameters(), *writer.model.buffers()]
    modules = list(writer.model.modules())
    packed = sum(isinstance(module, PackedLinear) for module in modules)
    return GeneratedText(
        model=writer.name,
        text=task.tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tuple(tokens),
        ended=tokens[-1] in writer.ends,
        prefill=prefill,
        decode=decoding,
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
