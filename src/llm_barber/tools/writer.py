"""Load a model, warm it up, and let it write its text, with the memory that this takes."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.progress import Progress
from llm_barber.runtime.load import load
from llm_barber.settings.generate import GenerateConfig, KeepPacked
from llm_barber.tools.decoding import Clock, CountedTokens, PiecewiseText, decode, settings_of_generation
from llm_barber.usage import current_memory, peak_device_memory, peak_memory, reset_peak_memory

WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 3  # most tokens of the prompt, and new tokens, before anything is timed

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was checked, and whose weights are not loaded yet.

    `config`: the language model's part of the configuration.
    """

    source: CheckpointSource
    config: PreTrainedConfig
    keep_packed: KeepPacked

    @property
    def name(self) -> str:
        """The model, as it was named."""
        return self.source.model


@dataclass(frozen=True)
class Task:
    """A prompt's token ids, int64, (1, tokens), and all that two models share."""

    tokens: Tensor
    tokenizer: Any
    new_tokens: int
    config: GenerateConfig
    device: torch.device
    dtype: torch.dtype


@dataclass
class TextWriter:
    """A loaded model, the clock of its text, and the memory that it took, bytes."""

    name: str
    model: PreTrainedModel
    ends: frozenset[int]
    text: Clock
    peak_memory: int | None


def load_and_write(task: Task, opened: Opened, progress: Progress, on_text: OnText | None) -> tuple[TextWriter, bool]:
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
    streamer: BaseStreamer = CountedTokens(lambda: progress.advance(""))
    if on_text is None:
        progress.start(f"{opened.name} writes", task.new_tokens)
    else:
        streamer = PiecewiseText(task.tokenizer, on_text)
    clock = Clock(streamer)
    settings = settings_of_generation(task.new_tokens, task.config.temperature, ends, min(ends, default=0))
    with torch.random.fork_rng(devices=[task.device] if on_gpu else []):
        torch.manual_seed(task.config.seed)
        finished = decode(model, task.tokens, settings, clock)
    if not clock.tokens:
        raise KeyboardInterrupt
    peak = peak_device_memory(task.device) if on_gpu else peak_memory() if sys.platform == "linux" else None
    return TextWriter(opened.name, model, ends, clock, None if peak is None else peak - before), finished


def _load(task: Task, opened: Opened, progress: Progress) -> PreTrainedModel:
    """Load a model; its warnings go to the progress."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", module=r"llm_barber\.")
        if opened.keep_packed is KeepPacked.AUTO and task.device.type == "cpu":
            model = load(opened.name, "auto", task.dtype, str(task.device), progress=progress)
        else:
            packs = opened.keep_packed is not KeepPacked.NO
            model = load(opened.name, packs, task.dtype, str(task.device), progress=progress)
    for warning in caught:
        progress.warn(str(warning.message))
    return model


def _ends(model: PreTrainedModel, tokenizer: Any, name: str) -> frozenset[int]:
    """Tokens that end a text, by the model's settings of generation, its configuration and its tokenizer.

    Raises:
        ModelError: one of them is no token id.
    """
    config = model.config.get_text_config()
    ends: set[int] = set()
    for owner in (model.generation_config, config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        for token in ids:
            if not isinstance(token, int) or token < 0:
                raise ModelError(
                    f"{name} says that its texts end with token {token!r}, which is no token id",
                    "correct eos_token_id in generation_config.json and config.json",
                )
        ends |= set(ids)
    return frozenset(ends)


def _warm_up(model: PreTrainedModel, prompt: Tensor, name: str) -> None:
    """Let a model write a few tokens: threads and buffers are made at the first use, and weights come into caches.

    Raises:
        ModelError: logits are NaN or Inf.
    """
    prompt = prompt.to(model.device)
    settings = settings_of_generation(WARM_UP_TOKENS)
    settings.output_logits = settings.return_dict_in_generate = True
    model.generation_config = settings
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    if not all(torch.isfinite(end) for logits in output.logits for end in torch.aminmax(logits)):
        raise ModelError(
            f"{name} gives NaN or Inf logits for the prompt",
            "compute with a wider range: --dtype bfloat16 or float32; if it was, the model is broken",
        )
