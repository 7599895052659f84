"""Load a checkpoint's tokenizer, and refuse token ids that its model does not know."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from llm_barber.errors import CalibrationError, first_line
from llm_barber.text.windows import beginning_of_texts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> Any | None:
    """Tokenizer of a model's folder; None: the folder has none.

    Raises:
        CalibrationError: it cannot be loaded, or cannot tokenize a short text.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None  # some tokenizers would load empty instead of raising an error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        beginning_of_texts(tokenizer)
        return tokenizer
    except (KeyboardInterrupt, SystemExit, MemoryError, CalibrationError):
        raise
    except BaseException as error:  # tokenizers raise all kinds of errors; those in Rust raise a BaseException
        raise CalibrationError(
            f"the tokenizer in {folder} cannot be loaded: {first_line(error)}",
            "get the tokenizer's files again",
        ) from error


def check_vocabulary(config: PreTrainedConfig, tokens: Tensor) -> None:
    """Refuse token ids, int64, that are outside the model's vocabulary."""
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= config.vocab_size:
        raise CalibrationError(
            f"token {high if low >= 0 else low} is outside the model's vocabulary of {config.vocab_size}",
            "the tokenizer, or the token file, belongs to another model",
        )
