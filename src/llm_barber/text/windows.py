"""Cut a text into windows of tokens of equal length; each begins as the tokenizer lets texts begin."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_barber.errors import CalibrationError, first_line

TOKENIZER_HINT = "get tokenizer.json and tokenizer_config.json again, or give --calibration a file with input_ids"


class TextTokenizer(Protocol):
    """A tokenizer, as far as it is used here."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        """Return an object with `input_ids`."""


def windows_of(text: str, tokenizer: TextTokenizer, seqlen: int, bos: bool) -> tuple[Tensor, int]:
    """Whole windows of a text, int64 (windows, seqlen), and the number of its tokens.

    Args:
        text: the whole text.
        tokenizer: the model's tokenizer.
        seqlen: tokens per window.
        bos: let each window begin as the tokenizer lets texts begin, usually with BOS; if False, only the text does.
    """
    tokens = tokens_of(text, tokenizer)
    return cut(tokens, seqlen, beginning_of_texts(tokenizer) if bos else ()), len(tokens)


def tokens_of(text: str, tokenizer: TextTokenizer, add_special_tokens: bool = True) -> list[int]:
    """Tokenise a text.

    Raises:
        CalibrationError: the tokenizer fails, because its files are damaged.
    """
    try:
        tokens = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        torch.tensor(tokens, dtype=torch.int64)
        return tokens
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raise any error; those in Rust raise a BaseException
        raise CalibrationError(
            f"the model's tokenizer cannot make tokens of text: {first_line(error)}", TOKENIZER_HINT
        ) from error


def beginning_of_texts(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Tokens that the tokenizer puts before each text: BOS, or two tokens; () if it puts none.

    A model that has always seen these tokens can fail without them: Gemma 3 270M has perplexity 33 with BOS, and 59 in
    windows from the middle of a text. A model in use sees them, so windows have them, too.
    """
    whole, bare = (tokens_of("A", tokenizer, add_special_tokens) for add_special_tokens in (True, False))
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def cut(tokens: Sequence[int], seqlen: int, beginning: Sequence[int] = ()) -> Tensor:
    """Cut tokens into whole windows without overlap, int64 (windows, seqlen).

    Example: tokens=[1, 5, 6, 7, 8, 9], seqlen=3, beginning=[1] -> [[1, 5, 6], [1, 7, 8]]

    Args:
        tokens: the tokens of the text, as the tokenizer returns them.
        seqlen: tokens per window.
        beginning: tokens at the start of each window, which text follows.
    """
    text_tokens = seqlen - len(beginning)
    tokens = tokens[len(beginning) :] if list(tokens[: len(beginning)]) == list(beginning) else tokens
    count = len(tokens) // text_tokens if text_tokens > 0 else 0
    text = torch.tensor(tokens[: count * text_tokens], dtype=torch.int64).view(count, max(text_tokens, 0))
    return torch.cat([torch.tensor(beginning, dtype=torch.int64).expand(count, -1), text], 1)
