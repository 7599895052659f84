"""Settings in messages as the user types them: `--refine tune`, `--no-rebuild`, OUT for an argument."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typer.main import get_command

from llm_barber.cli.app import app
from llm_barber.messages import SettingName


def find_command(words: Sequence[str]) -> Any | None:
    """Find the command that these words call; None: they call none."""
    commands: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return next((commands[word] for word in words if word in commands), None)


def as_typed(words: Sequence[str]) -> Callable[[SettingName], str]:
    """Renderer of settings as options of the command in these words.

    A setting that the command does not take keeps its name.
    """
    command = find_command(words)
    parameters = {} if command is None else {parameter.name: parameter for parameter in command.params}

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


def empty_argument(words: Sequence[str]) -> str | None:
    """Find the first option or argument with an empty value, and return its name as the user types it.

    An empty value is refused because an empty path would mean the current folder.

    Example: ["prune", "model", "--overwrite", ""] -> "OUT", ["prune", "model", "out", "--layers="] -> "--layers".
    """
    command = find_command(words)
    parameters = [] if command is None else command.params
    takes_value = {
        name: not parameter.is_flag
        for parameter in parameters
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    arguments = iter([parameter.metavar for parameter in parameters if parameter.param_type_name == "argument"])
    option = None
    for word in words[words.index(command.name) + 1 :] if command is not None else []:
        name, equals, value = word.partition("=")
        if option is not None:
            target, content, option = option, word, None
        elif name.startswith("--") and equals:
            target, content = name, value
        elif takes_value.get(word):
            option = word
            continue
        elif word in takes_value:
            continue
        else:
            target, content = next(arguments, "an argument"), word
        if not content.strip():
            return str(target)
    return None
