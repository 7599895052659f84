"""Tokenizers with one token a character."""

from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def add_tokenizer(folder: Path, bos: bool = False) -> None:
    """Save a tokenizer with one token a character beside a model; `bos`: it puts "~", 94, in front of each text."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="~ $A", special_tokens=[("~", 94)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", bos_token="~" if bos else None).save_pretrained(
        folder
    )


class CharacterTokenizer:
    """Gives each character its code point, and puts special tokens before and after a text."""

    def __init__(self, beginning: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> None:
        self.beginning, self.end = beginning, end

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """Tokenize a text, as a tokenizer of transformers does."""
        ids = [ord(character) for character in text]
        return SimpleNamespace(input_ids=[*self.beginning, *ids, *self.end] if add_special_tokens else ids)


tokenize_characters = CharacterTokenizer()
