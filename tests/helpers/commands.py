"""The commands of the command line, and their arguments and options."""

from typing import Any

from typer.main import get_command

from llm_barber.cli import _main, app

COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]


def call(*arguments: object) -> int:
    """Run the command line in this process; returns its exit code."""
    return _main([str(argument) for argument in arguments])


def parameters(command: str) -> dict[str, Any]:
    """The arguments and options of a command by the names of the settings."""
    return {parameter.name: parameter for parameter in COMMANDS[command].params}
