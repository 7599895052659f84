"""LLM-Barber: prune a large language model in one shot, then rebuild its mask block by block (arXiv 2408.10631)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from llm_barber.comparison.compare import compare
    from llm_barber.comparison.result import Comparison
    from llm_barber.errors import BarberError
    from llm_barber.evaluation.evaluate import evaluate
    from llm_barber.evaluation.result import Evaluation
    from llm_barber.record.report import RunReport
    from llm_barber.run.commands import prune, rebuild
    from llm_barber.runtime.load import load
    from llm_barber.settings.compare import CompareConfig
    from llm_barber.settings.copies import PackConfig
    from llm_barber.settings.evaluate import EvaluateConfig
    from llm_barber.settings.inspect import InspectConfig
    from llm_barber.settings.prune import PruneConfig, RebuildConfig
    from llm_barber.tools.inspection import Inspection, inspect
    from llm_barber.tools.packing import PackReport, pack, unpack

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
    "CompareConfig": "settings.compare",
    "Comparison": "comparison.result",
    "EvaluateConfig": "settings.evaluate",
    "Evaluation": "evaluation.result",
    "InspectConfig": "settings.inspect",
    "Inspection": "tools.inspection",
    "PackConfig": "settings.copies",
    "PackReport": "tools.packing",
    "PruneConfig": "settings.prune",
    "RebuildConfig": "settings.prune",
    "RunReport": "record.report",
    "compare": "comparison.compare",
    "evaluate": "evaluation.evaluate",
    "inspect": "tools.inspection",
    "load": "runtime.load",
    "pack": "tools.packing",
    "prune": "run.commands",
    "rebuild": "run.commands",
    "unpack": "tools.packing",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("llm-barber")
        except PackageNotFoundError:  # the sources are on the path, and nothing is installed
            return "0+unknown"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
