"""LLM-Barber: prune a large language model in one shot, then rebuild its mask block by block (arXiv 2408.10631)."""

from importlib.metadata import version

from llm_barber.config import PruneConfig, RebuildConfig
from llm_barber.errors import BarberError
from llm_barber.inspection import InspectConfig, Inspection, inspect
from llm_barber.prune import prune, rebuild
from llm_barber.report import RunReport

__version__ = version("llm-barber")
__all__ = [
    "BarberError",
    "InspectConfig",
    "Inspection",
    "PruneConfig",
    "RebuildConfig",
    "RunReport",
    "inspect",
    "prune",
    "rebuild",
]
