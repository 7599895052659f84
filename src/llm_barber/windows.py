"""The tokens of a text → windows of one length, each of which begins as the tokenizer has texts begin."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def __call__(self, text: str) -> Any:
        """An object with `input_ids`."""


def beginning_of_text(tokenizer: Tokenizer) -> int | None:
    """The BOS token, if the tokenizer puts it in front of each text.

    A model that has always seen it there can be lost without: Gemma 3 270M has perplexity 33 with it and 59 with
    windows from the middle of a text. It is there when the model is used, so windows are to have it.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("A").input_ids)[:1] == [bos] else None


def cut(tokens: Sequence[int], seqlen: int, beginning: int | None = None) -> Tensor:
    """All whole windows of a text's tokens, without overlap, int64 (windows, seqlen).

    Args:
        tokens: of the text, as the tokenizer gives them.
        seqlen: tokens a window, 2 or more.
        beginning: of each window, followed by `seqlen` - 1 tokens of the text; None: all are of the text, as the
            released programs of SparseGPT, Wanda and LLM-Barber cut it: at most its first window has a BOS token.
    """
    text = torch.tensor(tokens, dtype=torch.int64)
    if beginning is None:
        count = len(text) // seqlen
        return text[: count * seqlen].view(count, seqlen)
    if len(text) and text[0] == beginning:
        text = text[1:]
    own = seqlen - 1
    count = len(text) // own
    return torch.cat([text.new_full((count, 1), beginning), text[: count * own].view(count, own)], 1)
