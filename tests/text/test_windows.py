import pytest
import torch

from llm_barber.text.windows import beginning_of_texts, cut, windows_of
from tests.helpers.text import CharacterTokenizer


@pytest.mark.parametrize("beginning", [(), (1,), (1, 7)])
@pytest.mark.parametrize("end", [(), (1,)])
def test_what_texts_begin_with(beginning: tuple[int, ...], end: tuple[int, ...]) -> None:
    assert beginning_of_texts(CharacterTokenizer(beginning, end)) == beginning


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ((), [[1, 10, 11], [12, 13, 14]]),
        ((1,), [[1, 10, 11], [1, 12, 13], [1, 14, 15]]),  # the one in front of the text is not there twice
        ((1, 10), [[1, 10, 11], [1, 10, 12], [1, 10, 13], [1, 10, 14], [1, 10, 15]]),
    ],
)
def test_windows(beginning: tuple[int, ...], expected: list[list[int]]) -> None:
    windows = cut([1, 10, 11, 12, 13, 14, 15], 3, beginning)
    assert windows.tolist() == expected
    assert windows.dtype == torch.int64


def test_too_short_a_text_has_none() -> None:
    for windows in (cut([], 4, (1,)), cut([1, 5], 4, (1,)), cut([1, 5, 6], 4), cut([1, 2, 3, 4], 4, (1, 2, 3, 4))):
        assert windows.shape == (0, 4)


def test_windows_of_a_text() -> None:
    windows, tokens = windows_of("ABCD", CharacterTokenizer((1,)), 3, bos=True)
    assert (windows.tolist(), tokens) == ([[1, 65, 66], [1, 67, 68]], 5)
    windows, tokens = windows_of("ABCD", CharacterTokenizer((1,)), 3, bos=False)
    assert (windows.tolist(), tokens) == ([[1, 65, 66]], 5)
