"""Check that two models read the same tokens, so that what they predict can be compared."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llm_barber.errors import ModelError
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.text.calibration import read_text
from llm_barber.text.windows import tokens_of

SAMPLE_CHARACTERS = 5000  # length of the text on which two tokenizers are compared
HINT = "compare models with the same tokenizer"


def check_same_tokenizer(tokenizer: Any, model: str, folder: Path) -> None:
    """Refuse a model with another tokenizer: ids that mean different words cannot be compared.

    Args:
        tokenizer: of the first model.
        model: the other model, as it was named.
        folder: of the other model; it may have no tokenizer.

    Raises:
        ModelError: the tokenizers divide a sample of text differently.
    """
    other = load_tokenizer(folder)
    sample = read_text("builtin")[:SAMPLE_CHARACTERS]
    if other is not None and tokens_of(sample, tokenizer) != tokens_of(sample, other):
        raise ModelError(f"{model} has another tokenizer", HINT)


def check_same_vocabulary(model: str, config: PreTrainedConfig, other: str, other_config: PreTrainedConfig) -> None:
    """Refuse two models, each as it was named and with its language model's configuration, of other vocabularies.

    Raises:
        ModelError: the sizes of their vocabularies differ.
    """
    if config.vocab_size != other_config.vocab_size:
        raise ModelError(
            f"{model} has a vocabulary of {config.vocab_size}, {other} one of {other_config.vocab_size}", HINT
        )
