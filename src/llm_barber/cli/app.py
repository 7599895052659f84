"""The typer application, and the decorator that makes a command's options from its settings."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from llm_barber.cli.help import HelpCommand, HelpGroup
from llm_barber.cli.options import DebugOption, parameters_of
from llm_barber.settings.checked import Settings

Function = Callable[..., None]

app = typer.Typer(
    name="llm-barber",
    cls=HelpGroup,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    help="Prune a large language model in one shot, without training: block-aware masks, after arXiv 2408.10631.",
    epilog="Exit codes: 0 done, 1 a problem with files or models, 2 wrong options, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version", is_eager=True)] = False,
) -> None:
    if version:
        from llm_barber import __version__

        print(__version__)
        raise typer.Exit


def command(
    config: type[Settings],
    arguments: Mapping[str, str],
    examples: Collection[str],
    python_only: Collection[str] = (),
) -> Callable[[Function], Function]:
    """Make a function a command; it is called with checked settings and with its additional options.

    Settings are checked before the function is called, and so before it imports PyTorch or shows progress. Wrong
    settings are reported at once, and nothing is printed before.

    Args:
        config: class of the settings.
        arguments: metavars of the arguments, by the names of their settings.
        examples: command lines for `--help`.
        python_only: names of settings that the command line does not take.
    """
    shared = parameters_of(config, arguments, python_only)
    names = [parameter.name for parameter in shared]

    def decorate(function: Function) -> Function:
        additional = [*inspect.signature(function).parameters.values()][1:]
        debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
        parameters = [*shared, *(option.replace(kind=option.KEYWORD_ONLY) for option in additional), debug]

        @wraps(function)
        def run(debug: bool, **values: Any) -> None:  # main() reads --debug from the command line
            settings = {name: values.pop(name) for name in names}
            typed = {name: value for name, value in settings.items() if value is not None and value != []}
            function(config(**typed), **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        epilog = "\n\n".join([f"Example{'s' if len(examples) > 1 else ''}:", *examples])
        app.command(cls=HelpCommand, epilog=epilog)(run)
        return function

    return decorate


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    import json

    print(json.dumps(value, indent=1))
