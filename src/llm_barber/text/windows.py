"""A text → windows of tokens of one length, each of which begins as the tokenizer has texts begin."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_barber.errors import CalibrationError, first_line

TOKENIZER_HINT = "get tokenizer.json and tokenizer_config.json again, or give --calibration a file with input_ids"


class TextTokenizer(Protocol):
    """What is needed of a tokenizer."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        """An object with `input_ids`."""


def windows_of(text: str, tokenizer: TextTokenizer, seqlen: int, bos: bool) -> tuple[Tensor, int]:
    """All whole windows of a text, int64 (windows, seqlen), and how many tokens it has.

    Args:
        text: the whole of it.
        tokenizer: the model's.
        seqlen: tokens a window.
        bos: let each begin as the tokenizer has texts begin, with a BOS token most often; else only the text does.
    """
    tokens = tokens_of(text, tokenizer)
    return cut(tokens, seqlen, beginning_of_texts(tokenizer) if bos else ()), len(tokens)


def tokens_of(text: str, tokenizer: TextTokenizer, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text.

    Raises:
        CalibrationError: the tokenizer cannot make them, because its files are damaged.
    """
    try:
        tokens = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        torch.tensor(tokens, dtype=torch.int64)
        return tokens
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # each tokenizer complains in its own way; those in Rust by a BaseException
        raise CalibrationError(
            f"the model's tokenizer cannot make tokens of text: {first_line(error)}", TOKENIZER_HINT
        ) from error


def beginning_of_texts(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The tokens that the tokenizer puts in front of each text: BOS; of some two; () if it puts none.

    A model that has always seen them there can be lost without: Gemma 3 270M has perplexity 33 with BOS and 59 in
    windows from the middle of a text. They are there when the model is used, so windows are to have them.
    """
    whole, own = (tokens_of("A", tokenizer, one) for one in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(own)] == own)
    return tuple(whole[: next(starts, 0)])


def cut(tokens: Sequence[int], seqlen: int, beginning: Sequence[int] = ()) -> Tensor:
    """All whole windows of a text's tokens, without overlap, int64 (windows, seqlen).

    Args:
        tokens: of the text, as the tokenizer gives them.
        seqlen: tokens a window.
        beginning: of each window, followed by the text; none: wherever they are cut.
    """
    own = seqlen - len(beginning)
    tokens = tokens[len(beginning) :] if list(tokens[: len(beginning)]) == list(beginning) else tokens
    count = len(tokens) // own if own > 0 else 0
    text = torch.tensor(tokens[: count * own], dtype=torch.int64).view(count, max(own, 0))
    return torch.cat([torch.tensor(beginning, dtype=torch.int64).expand(count, -1), text], 1)
