"""Settings in messages as they are typed: `--refine tune`, `--no-rebuild`, or OUT for an argument."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typer.main import get_command

from llm_barber.cli.app import app
from llm_barber.messages import SettingName


def as_typed(given: Sequence[str]) -> Callable[[SettingName], str]:
    """How the command of these arguments takes a setting; a setting that it does not take keeps its name."""
    commands: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    command = next((word for word in given if word in commands), None)
    parameters = {} if command is None else {parameter.name: parameter for parameter in commands[command].params}

    def render(setting: SettingName) -> str:
        parameter = parameters.get(setting.name)
        if parameter is None:
            return str(setting)
        if parameter.param_type_name == "argument":
            return str(parameter.metavar)
        if isinstance(setting.value, bool):
            return str((parameter.opts if setting.value else parameter.secondary_opts)[0])
        option = str(parameter.opts[0])
        return option if setting.value is None else f"{option} {setting.value}"

    return render
