import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from llm_barber.errors import CalibrationError, HubError
from llm_barber.text.calibration import load_calibration, read_text
from tests.helpers.text import CharacterTokenizer, tokenize_characters


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(65 + i) for i in range(50)), encoding="utf-8")
    return str(path)


def test_windows_are_seeded_distinct_and_contiguous(text: str) -> None:
    windows = load_calibration(text, lambda: tokenize_characters, samples=6, seqlen=7, seed=0).input_ids
    assert windows.shape == (6, 7)
    assert windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    assert sorted((windows[:, 0] - 65).tolist()) == sorted(set((windows[:, 0] - 65).tolist()))
    assert all(start % 7 == 0 for start in (windows[:, 0] - 65).tolist())
    assert torch.equal(windows, load_calibration(text, lambda: tokenize_characters, 6, 7, 0).input_ids)
    assert not torch.equal(windows, load_calibration(text, lambda: tokenize_characters, 6, 7, 1).input_ids)


def test_windows_begin_with_bos_where_texts_do(text: str) -> None:
    windows = load_calibration(text, lambda: CharacterTokenizer((1,)), 6, 7, 0).input_ids
    assert windows.shape == (6, 7)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:].diff(dim=1) == 1).all()
    without = load_calibration(text, lambda: CharacterTokenizer((1,)), 7, 7, 0, bos=False).input_ids
    assert (without == 1).sum() == 1  # the text's
    assert load_calibration(text, lambda: CharacterTokenizer((1,)), 6, 7, 0).first_token == 1
    assert load_calibration(text, lambda: CharacterTokenizer((1,)), 7, 7, 0, bos=False).first_token is None


def test_digest_is_of_the_tokens(text: str) -> None:
    tokens = load_calibration(text, lambda: tokenize_characters, 6, 7, 0)
    assert tokens.digest == load_calibration(text, lambda: tokenize_characters, 6, 7, 0).digest
    assert tokens.digest != load_calibration(text, lambda: tokenize_characters, 6, 7, 1).digest


def test_too_short_says_how_much_there_is(text: str) -> None:
    with pytest.raises(CalibrationError, match="has 50 tokens, 7 windows of 7; 8 are needed") as caught:
        load_calibration(text, lambda: tokenize_characters, 8, 7, 0)
    assert "--samples 7" in caught.value.hint
    with pytest.raises(CalibrationError, match="0 windows of 51") as caught:
        load_calibration(text, lambda: tokenize_characters, 1, 51, 0)
    assert "--seqlen of 50" in caught.value.hint


def test_jsonl_and_parquet_are_joined_documents(tmp_path: Path) -> None:
    documents = ["ab\ncd", "éf"]
    lines = tmp_path / "d.jsonl"
    lines.write_text("\n".join(json.dumps({"text": document}) for document in documents) + "\n\n", encoding="utf-8")
    parquet = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, "n": [1, 2]}), parquet)
    assert read_text(str(lines)) == read_text(str(parquet)) == "ab\ncd\n\néf"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is not an object with a string `text`"),
        ("a.jsonl", b"nonsense\n", "line 1"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 is not JSON: it holds a lone surrogate"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        ("a.parquet", b"nonsense", "not a parquet file"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.safetensors", b"nonsense", "not a safetensors file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(str(path), lambda: tokenize_characters, 1, 1, 0)


def test_parquet_without_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match="no column `text` but body"):
        read_text(str(tmp_path / "a.parquet"))


def test_token_files_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = torch.arange(12).view(3, 4)
    save_file({"input_ids": ids}, tmp_path / "t.safetensors")
    tokens = load_calibration(str(tmp_path / "t.safetensors"), lambda: None, 128, 2048, 5)
    assert torch.equal(tokens.input_ids, ids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": torch.ones(2, 2)},
        {"input_ids": torch.ones(3, 1, dtype=torch.int64)},
        {"input_ids": torch.ones(2, 2)},
        {"input_ids": torch.arange(3)},
    ],
)
def test_wrong_token_files(tmp_path: Path, wrong: dict[str, torch.Tensor]) -> None:
    save_file(wrong, tmp_path / "t.safetensors")
    with pytest.raises(CalibrationError, match="input_ids") as caught:
        load_calibration(str(tmp_path / "t.safetensors"), lambda: None, 1, 1, 0)
    assert "int64" in caught.value.hint


def test_unknown_text_lists_the_known() -> None:
    with pytest.raises(CalibrationError, match="no such calibration text: nothing") as caught:
        read_text("nothing")
    assert "builtin, c4, wikitext2" in caught.value.hint


def test_no_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        load_calibration("builtin", lambda: None, 1, 1, 0)


def test_builtin_texts_are_there() -> None:
    assert len(read_text("builtin")) > 2_000_000
    assert read_text("builtin-test").startswith(" \n = Robert Boulter = \n")


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_hub_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows(**settings: object) -> object:
        for number in range(1000):
            read.append(settings["path"])
            yield {"text": f"document {number}"}

    monkeypatch.setattr("datasets.load_dataset", rows)
    assert read_text(name, tokens_wanted=10).startswith("document 0\n\ndocument 1")
    assert len(read) == (1000 if name == "wikitext2" else 12)  # c4 is streamed, no further than needed

    def offline(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(HubError, match="could not be loaded from the hub") as caught:
        read_text(name)
    assert "builtin" in caught.value.hint


def test_empty_text_and_parquet_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match="has 0 tokens") as caught:
        load_calibration(str(tmp_path / "empty.txt"), lambda: tokenize_characters, 1, 4, 0)
    assert caught.value.hint == "use a longer text"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(CalibrationError, match="not of strings"):
        read_text(str(tmp_path / "n.parquet"))
