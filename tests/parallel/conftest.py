"""A small model, and a function that prunes it with calibration text of six windows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, RunReport, prune
from tests.conftest import make_model, save_tokens
from tests.helpers.runs import SETTINGS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., RunReport]:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)

    def call(out: str, **settings: Any) -> RunReport:
        return prune(PruneConfig(model=model, output=tmp_path / out, calibration=tokens, **{**SETTINGS, **settings}))

    return call
