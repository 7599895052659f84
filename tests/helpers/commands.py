"""The commands: the settings of each, the metavars of its arguments, and its parameters."""

from typing import Any

from typer.main import get_command

from llm_barber.cli import app
from llm_barber.settings.checked import Settings
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.copies import ConvertConfig, PackConfig
from llm_barber.settings.demo import DemoConfig
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.generate import GenerateConfig
from llm_barber.settings.inspect import InspectConfig
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.report import ReportConfig

CONFIGS: dict[str, type[Settings]] = {
    "prune": PruneConfig, "rebuild": RebuildConfig, "plan": PlanConfig, "inspect": InspectConfig, "pack": PackConfig,
    "unpack": PackConfig, "convert": ConvertConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig,
    "compare": CompareConfig, "report": ReportConfig, "demo": DemoConfig,
}  # fmt: skip
ARGUMENTS = {
    "prune": {"model": "MODEL", "output": "OUT"},
    "rebuild": {"dense": "DENSE", "pruned": "PRUNED", "output": "OUT"},
    "plan": {"model": "MODEL_OR_CONFIG"},
    "inspect": {"model": "MODEL"},
    "pack": {"model": "PRUNED", "output": "PACKED"},
    "unpack": {"model": "PACKED", "output": "OUT"},
    "convert": {"model": "MODEL", "output": "OUT"},
    "evaluate": {"model": "MODEL"},
    "generate": {"model": "MODEL", "prompt": "PROMPT"},
    "compare": {"model": "MODEL", "output": "OUT"},
    "report": {"folder": "OUT"},
    "demo": {},
}
COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]


def parameters(command: str) -> dict[str, Any]:
    """The arguments and options of a command by the names of the settings."""
    return {parameter.name: parameter for parameter in COMMANDS[command].params}
