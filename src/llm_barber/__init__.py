"""LLM-Barber: prune a large language model in one shot, without training: block-aware masks, after arXiv 2408.10631."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from llm_barber.comparison.compare import compare
    from llm_barber.comparison.result import Comparison
    from llm_barber.errors import BarberError
    from llm_barber.evaluation.evaluate import evaluate
    from llm_barber.evaluation.result import Evaluation
    from llm_barber.page.write import report
    from llm_barber.planning.forecast import Forecast
    from llm_barber.planning.plan import plan
    from llm_barber.record.report import RunReport
    from llm_barber.run.commands import prune, rebuild
    from llm_barber.runtime.held_zeros import HeldZeros, HoldZeros, hold_zeros
    from llm_barber.runtime.load import load
    from llm_barber.runtime.registry import PackedConfig, register
    from llm_barber.settings.compare import CompareConfig, EvaluateConfig
    from llm_barber.settings.plan import PlanConfig
    from llm_barber.settings.prune import PruneConfig, RebuildConfig
    from llm_barber.settings.tools import (
        ConvertConfig,
        GenerateConfig,
        InspectConfig,
        PackConfig,
        ReportConfig,
        UnpackConfig,
    )
    from llm_barber.tools.convert import ConvertReport, convert
    from llm_barber.tools.finetuned import merge_adapter, save_finetuned
    from llm_barber.tools.generate import generate
    from llm_barber.tools.generation import Generation
    from llm_barber.tools.inspection import Inspection, inspect
    from llm_barber.tools.packing import PackReport, pack, unpack

__all__ = [
    "BarberError",
    "CompareConfig",
    "Comparison",
    "ConvertConfig",
    "ConvertReport",
    "EvaluateConfig",
    "Evaluation",
    "Forecast",
    "GenerateConfig",
    "Generation",
    "HeldZeros",
    "HoldZeros",
    "InspectConfig",
    "Inspection",
    "PackConfig",
    "PackReport",
    "PackedConfig",
    "PlanConfig",
    "PruneConfig",
    "RebuildConfig",
    "ReportConfig",
    "RunReport",
    "UnpackConfig",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "hold_zeros",
    "inspect",
    "load",
    "merge_adapter",
    "pack",
    "plan",
    "prune",
    "rebuild",
    "register",
    "report",
    "save_finetuned",
    "unpack",
]

# Modules of the public names. They are imported at first use, so that the command line starts without PyTorch and
# transformers.
_MODULES = {
    "BarberError": "errors",
    "CompareConfig": "settings.compare",
    "Comparison": "comparison.result",
    "ConvertConfig": "settings.tools",
    "ConvertReport": "tools.convert",
    "EvaluateConfig": "settings.compare",
    "Evaluation": "evaluation.result",
    "Forecast": "planning.forecast",
    "GenerateConfig": "settings.tools",
    "Generation": "tools.generation",
    "HeldZeros": "runtime.held_zeros",
    "HoldZeros": "runtime.held_zeros",
    "InspectConfig": "settings.tools",
    "Inspection": "tools.inspection",
    "PackConfig": "settings.tools",
    "PackReport": "tools.packing",
    "PackedConfig": "runtime.registry",
    "PlanConfig": "settings.plan",
    "PruneConfig": "settings.prune",
    "RebuildConfig": "settings.prune",
    "ReportConfig": "settings.tools",
    "RunReport": "record.report",
    "UnpackConfig": "settings.tools",
    "compare": "comparison.compare",
    "convert": "tools.convert",
    "evaluate": "evaluation.evaluate",
    "generate": "tools.generate",
    "hold_zeros": "runtime.held_zeros",
    "inspect": "tools.inspection",
    "load": "runtime.load",
    "merge_adapter": "tools.finetuned",
    "pack": "tools.packing",
    "plan": "planning.plan",
    "prune": "run.commands",
    "rebuild": "run.commands",
    "register": "runtime.registry",
    "report": "page.write",
    "save_finetuned": "tools.finetuned",
    "unpack": "tools.packing",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("llm-barber")
        except PackageNotFoundError:  # the sources are on the path, but the package is not installed
            return "0+unknown"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
