"""Runs that prune in float32 and write no page."""

from pathlib import Path

from llm_barber import PruneConfig, RunReport, prune


def run(model: Path, output: Path, tokens: Path, **settings: object) -> RunReport:
    """Prune with these settings."""
    config = {"dtype": "float32", "report": False, **settings}
    return prune(PruneConfig(model=model, output=output, calibration=tokens, **config))
