from pathlib import Path

import pytest
import torch

from llm_barber.tools.selftest.bench import CPU, Bench, Size

TINY = Size(64, 96, 2, 4, 2, 128, windows=4, tokens=32)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The CPU, with tiny models."""
    return Bench(CPU, torch.float32, tmp_path, TINY)
