import pytest

from llm_barber.errors import CalibrationError
from llm_barber.evaluation.texts import evaluation_windows
from tests.helpers.text import tokenize_characters


def test_windows_follow_each_other() -> None:
    assert evaluation_windows("text", "ABCDEFG", tokenize_characters, 2).tolist() == [[65, 66], [67, 68], [69, 70]]
    assert evaluation_windows("text", "ABCDEFG", tokenize_characters, 2, 1).tolist() == [[65, 66]]
    with pytest.raises(CalibrationError, match="fewer than one window of 8"):
        evaluation_windows("text", "ABCDEFG", tokenize_characters, 8)


def test_c4_is_its_first_windows() -> None:
    assert len(evaluation_windows("c4", "A" * 600, tokenize_characters, 2)) == 256
    assert len(evaluation_windows("other", "A" * 600, tokenize_characters, 2)) == 300
