"""Prompt of `generate`: read it, put it into a chat template, make tokens of it, and check that they fit."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llm_barber.errors import CalibrationError, ModelError, SettingsError, first_line
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.progress import Progress
from llm_barber.settings.tools import STANDARD_INPUT, GenerateConfig
from llm_barber.text.windows import tokens_of

TOKENIZER_HINT = "get tokenizer.json and tokenizer_config.json of the model again"
POSITIONS = ("max_position_embeddings", "max_seq_len")  # names in configurations


def read_prompt(prompt: str, progress: Progress) -> str:
    """The prompt, or all of standard input, without the end of its last line, if the prompt is `-`.

    Raises:
        SettingsError: standard input is empty, or no UTF-8.
    """
    if prompt != STANDARD_INPUT:
        return prompt
    if sys.stdin.isatty():
        progress.stage("reading the prompt from standard input, up to Ctrl-D")
    try:
        text = sys.stdin.read()
        text.encode()
    except UnicodeError:
        raise SettingsError("PROMPT: standard input is not UTF-8", "convert it first, with iconv") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise SettingsError("PROMPT: standard input is empty", "pipe a text into the command, or type one")
    return text


def open_tokenizer(model: str, folder: Path) -> Any:
    """Tokenizer of a model.

    Raises:
        ModelError: the model has none, or a damaged one.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except CalibrationError as error:
        raise ModelError(error.message, TOKENIZER_HINT) from error
    if tokenizer is None:
        raise ModelError(
            f"{model} has no tokenizer, which a prompt needs",
            "copy tokenizer.json and tokenizer_config.json of the model that it was made of into the folder",
        )
    return tokenizer


def has_template(tokenizer: Any) -> bool:
    """True if a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(prompt: str, tokenizer: Any, config: GenerateConfig) -> tuple[Tensor, bool]:
    """Token ids of the prompt, int64, (1, tokens), and whether they are in the chat template.

    A chat template writes the tokens that begin a text itself, so the tokenizer adds none there.

    Raises:
        SettingsError: `chat` is set, and there is no template.
        ModelError: the template or the tokenizer fails, because its files are damaged.
    """
    chat = has_template(tokenizer) if config.chat is None else config.chat
    if chat and not has_template(tokenizer):
        raise SettingsError(
            f"--chat needs a chat template, and the tokenizer of {config.model} has none",
            "leave --chat out: PROMPT is then continued as text",
        )
    if chat:
        prompt = _in_template(prompt, tokenizer, config.model)
    try:
        tokens = tokens_of(prompt, tokenizer, add_special_tokens=not chat)
    except CalibrationError as error:
        raise ModelError(error.message, TOKENIZER_HINT) from error
    if not tokens:
        raise ModelError(f"the tokenizer of {config.model} makes no tokens of the prompt", TOKENIZER_HINT)
    return torch.tensor([tokens]), chat


def _in_template(prompt: str, tokenizer: Any, model: str) -> str:
    """A conversation of one message, and the beginning of the answer, as the chat template writes them."""
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return text
    except Exception as error:  # templates raise whatever they like
        raise ModelError(
            f"the chat template of {model} fails: {first_line(error)}",
            "--no-chat continues PROMPT as text",
        ) from error


def room_for_text(configs: Iterable[PreTrainedConfig], prompt: int, wanted: int, progress: Progress) -> int:
    """Number of new tokens: as many as wanted, or as many as the models have positions for, with a warning.

    Args:
        configs: of the language models; some have no limit.
        prompt: tokens of the prompt.
        wanted: most new tokens.
        progress: is warned.

    Raises:
        ModelError: the prompt leaves no room for a token.
    """
    limits = [getattr(config, name, None) for config in configs for name in POSITIONS]
    positions = min((limit for limit in limits if isinstance(limit, int)), default=prompt + wanted)
    if prompt >= positions:
        raise ModelError(
            f"the prompt has {prompt:,} tokens, and the model's context is {positions:,} tokens long",
            f"shorten the prompt by at least {prompt - positions + 1:,} tokens",
        )
    if prompt + wanted > positions:
        progress.warn(
            f"the model's context of {positions:,} tokens has room for {positions - prompt:,} tokens after the prompt"
        )
    return min(wanted, positions - prompt)
