"""A model of three decoder layers."""

from pathlib import Path

import pytest

from tests.conftest import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)
