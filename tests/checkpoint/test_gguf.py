"""Incomplete GGUF files."""

from pathlib import Path

import pytest

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
