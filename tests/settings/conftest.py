"""The model that the tests of targets prune."""

from pathlib import Path

import pytest

from tests.conftest import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny LLaMA of three layers."""
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)
