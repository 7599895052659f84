"""GGUF files: incomplete ones are refused, and transformers parses a file once."""

from pathlib import Path

import gguf
import numpy
import pytest

from llm_barber.checkpoint.gguf import _parsed_once, converted_gguf
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from tests.conftest import make_gguf


def test_a_file_without_some_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that transformers would make up."""
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    make_gguf(tmp_path / "a.gguf")
    with pytest.raises(
        ModelError, match=r"has no weights, or weights of another shape, for model\.layers\.0\.\S+ and \d+ more"
    ):
        CheckpointSource(tmp_path / "a.gguf")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_file_is_parsed_once_and_as_without_the_context(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "a.gguf")
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    usual = reader(path)
    with pytest.raises(ModelError, match="ends the context"), _parsed_once():
        parsed = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is parsed
        assert type(parsed.data) is numpy.ndarray
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
        raise ModelError("ends the context", "")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, name_map)
    assert {name: field.contents() for name, field in parsed.fields.items()} == {
        name: field.contents() for name, field in usual.fields.items()
    }
    (tensor,), (usual_tensor,) = parsed.tensors, usual.tensors
    assert tensor.name == usual_tensor.name
    assert numpy.array_equal(tensor.data, usual_tensor.data)


def test_two_processes_that_convert_a_file_share_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    calls: list[Path] = []

    def convert(_: Path, folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:  # while the first converts, the second begins and is faster
            converted_gguf(path)
        (folder / "config.json").write_text(str(len(calls)))

    monkeypatch.setattr("llm_barber.checkpoint.gguf._convert", convert)
    target = converted_gguf(path)
    assert len(set(calls)) == 2
    assert (target / "config.json").is_file()
    assert list((tmp_path / "cache").iterdir()) == [target]
