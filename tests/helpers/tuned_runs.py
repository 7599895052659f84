"""Runs that tune in batches of three windows, and the masks that they leave."""

from pathlib import Path
from typing import Any

from torch import Tensor

from llm_barber import PruneConfig, prune
from llm_barber.record.report import RunReport
from tests.conftest import read_folder

SEQUENCES = 10


def run(model: Path, output: Path, tokens: Path, **settings: Any) -> RunReport:
    """Prune with these settings."""
    config = {"dtype": "float32", "batch_size": 3, "report": False, **settings}
    return prune(PruneConfig(model=model, output=output, calibration=tokens, **config))


def masks(folder: Path) -> dict[str, Tensor]:
    """Keep masks of all linears, by name."""
    return {name: tensor != 0 for name, tensor in read_folder(folder).items() if "_proj" in name}
