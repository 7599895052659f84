from types import SimpleNamespace

import pytest
import torch

from llm_barber.windows import beginning_of_text, cut


class WithBos:
    """A tokenizer with one token a character, that puts 1 in front of texts, or not."""

    bos_token_id = 1

    def __init__(self, puts: bool = True) -> None:
        self.puts = puts

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * self.puts + [ord(character) for character in text])


def test_what_texts_begin_with() -> None:
    assert beginning_of_text(WithBos()) == 1
    assert beginning_of_text(WithBos(puts=False)) is None
    assert beginning_of_text(lambda text: SimpleNamespace(input_ids=[1, 2])) is None  # it has no such token


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        (None, [[1, 10, 11], [12, 13, 14]]),
        (1, [[1, 10, 11], [1, 12, 13], [1, 14, 15]]),  # the one in front of the text is not there twice
    ],
)
def test_windows(beginning: int | None, expected: list[list[int]]) -> None:
    windows = cut([1, 10, 11, 12, 13, 14, 15], 3, beginning)
    assert windows.tolist() == expected
    assert windows.dtype == torch.int64


def test_too_short_a_text_has_none() -> None:
    assert cut([], 4, 1).shape == cut([1, 5], 4, 1).shape == cut([1, 5, 6], 4).shape == (0, 4)
