"""LLM-Barber: prune a large language model in one shot, then rebuild its mask block by block (arXiv 2408.10631)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_barber.comparison.compare import Comparison, compare
    from llm_barber.comparison.settings import CompareConfig
    from llm_barber.config import PruneConfig, RebuildConfig
    from llm_barber.errors import BarberError
    from llm_barber.evaluation.evaluate import EvaluateConfig, Evaluation, evaluate
    from llm_barber.inspection import InspectConfig, Inspection, inspect
    from llm_barber.loading import load
    from llm_barber.packing import PackConfig, PackReport, pack, unpack
    from llm_barber.pruning import prune, rebuild
    from llm_barber.report import RunReport

__version__ = version("llm-barber")
__all__ = [
    "BarberError",
    "CompareConfig",
    "Comparison",
    "EvaluateConfig",
    "Evaluation",
    "InspectConfig",
    "Inspection",
    "PackConfig",
    "PackReport",
    "PruneConfig",
    "RebuildConfig",
    "RunReport",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "pack",
    "prune",
    "rebuild",
    "unpack",
]

# Imported when first asked for: `--help` should not wait for transformers.
_MODULES = {
    "BarberError": "errors",
    "CompareConfig": "comparison.settings",
    "Comparison": "comparison.compare",
    "EvaluateConfig": "evaluation.evaluate",
    "Evaluation": "evaluation.evaluate",
    "InspectConfig": "inspection",
    "Inspection": "inspection",
    "PackConfig": "packing",
    "PackReport": "packing",
    "PruneConfig": "config",
    "RebuildConfig": "config",
    "RunReport": "report",
    "compare": "comparison.compare",
    "evaluate": "evaluation.evaluate",
    "inspect": "inspection",
    "load": "loading",
    "pack": "packing",
    "prune": "pruning",
    "rebuild": "pruning",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
