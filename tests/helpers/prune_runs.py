"""Runs of `prune` without a page, and which tensors of their output are prunable linears."""

import re
from pathlib import Path

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.model.architecture import ARCHITECTURES

LINEARS = {linear for architecture in ARCHITECTURES.values() for linear in architecture.linears}


def is_linear(name: str) -> bool:
    """Is a tensor, by its name in the model, the weight of a prunable linear?"""
    match = re.fullmatch(r"(?:.*\.)?\d+\.(.+)\.weight", name)
    return match is not None and re.sub(r"\.\d+\.", ".*.", match[1]) in LINEARS


def run(model: Path, output: Path, tokens: Path, **settings: object) -> RunReport:
    """Prune with these settings."""
    config = {"report": False, **settings}  # drawing a page takes longer than these runs
    return prune(PruneConfig(model=str(model), output=output, calibration=str(tokens), **config))
