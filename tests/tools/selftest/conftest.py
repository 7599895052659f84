from pathlib import Path

import pytest
import torch

from llm_barber.tools.selftest.bench import CPU, TINY, Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The CPU, with tiny models."""
    return Bench(CPU, torch.float32, tmp_path, TINY)
