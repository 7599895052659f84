"""A tiny model and calibration tokens for runs that refine and tune."""

from pathlib import Path

import pytest

from tests.conftest import make_model, save_tokens
from tests.helpers.tuned_runs import SEQUENCES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny LLaMA of two layers."""
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=2)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Calibration tokens: `SEQUENCES` windows, of which some are held out."""
    return save_tokens(tmp_path / "tokens.safetensors", sequences=SEQUENCES)
