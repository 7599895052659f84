"""The typer application, and the decorator that makes a command's options from its settings."""

import inspect
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from llm_barber.cli.help import OUTPUT, HelpCommand, HelpGroup
from llm_barber.settings.base import Settings

KEYWORD = inspect.Parameter.KEYWORD_ONLY
# Panels of `--help` and their settings, both in the order that is shown. Settings without a panel are shown first.
PANELS: dict[str, tuple[str, ...]] = {
    "Method": (
        "methods", "targets", "preset", "sparsity", "pattern", "initial", "initial_granularity", "keep_updates",
        "allocation", "reorder", "rebuild", "granularity", "rebuild_ratio",
    ),
    "Quality": ("refine", "swaps", "reconstruct", "tune_passes", "tune_windows", "target_mix", "guard"),
    "Calibration": ("calibration", "samples", "seqlen", "bos", "seed", "seeds"),
    "Text": ("text", "text_seqlen", "windows", "chat", "max_new_tokens", "temperature", "against"),
    "Tasks": ("tasks", "tasks_folder", "limit"),
    "Linears": (
        "include", "exclude", "skip_layers", "sparsities", "prune_head", "allow_dense_tail", "layers", "blocks",
    ),
    "Resources": (
        "keep_packed", "repeats", "device", "dtype", "batch_size", "memory", "device_memory", "activations_off_device",
        "revision", "pruned_revision",
    ),
    "Machine": ("tflops", "gbps"),
    OUTPUT: ("format", "resume", "overwrite", "report", "keep_models"),
}  # fmt: skip
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
ORDER = list(PANEL_OF)
# What an option takes, where its type does not say it.
METAVARS = {
    "allocation": "SPREAD", "blocks": "FILE", "calibration": "NAME|FILE", "device": "DEVICE", "device_memory": "SIZE",
    "dtype": "DTYPE", "exclude": "REGEX", "gbps": "GB/S", "granularity": "SET", "include": "REGEX",
    "initial": "METHOD", "initial_granularity": "SET", "layers": "PATH", "memory": "SIZE", "methods": "NAME,…",
    "pattern": "N:M", "reconstruct": "HOW", "seeds": "SEED,…", "skip_layers": "N,…", "sparsities": "FILE",
    "sparsity": "X", "targets": "TARGET,…", "tasks": "NAME,…", "text": "NAME|FILE", "tflops": "TFLOP/S",
}  # fmt: skip
REPEATABLE = ("include", "exclude", "text")  # options that take a value at a time

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress", rich_help_panel=OUTPUT)]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors", rich_help_panel=OUTPUT)]

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
    config: type[Settings], examples: Collection[str], python_only: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command; it is called with checked settings and with its additional options.

    Settings are checked before the function is called, and so before it imports PyTorch or shows progress.

    Args:
        config: class of the settings.
        examples: command lines for `--help`.
        python_only: names of settings that the command line does not take.
    """
    names = [name for name in config.model_fields if name not in python_only]
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else -1)
    names.sort(key=lambda name: (config.model_fields[name].title is None, name == "output"))  # arguments come first
    settings = [_parameter(config, name) for name in names]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(debug: bool, **values: Any) -> None:  # main() reads --debug from the command line
            given = {name: values.pop(name) for name in names}
            function(config(**{name: value for name, value in given.items() if value is not None}), **values)

        _, *further = inspect.signature(function).parameters.values()
        debug = inspect.Parameter("debug", KEYWORD, default=False, annotation=DebugOption)
        parameters = [*settings, *(option.replace(kind=KEYWORD) for option in further), debug]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(cls=HelpCommand, epilog="\n\n".join(["Examples:", *examples]))(run)
        return function

    return decorate


def _parameter(config: type[Settings], name: str) -> inspect.Parameter:
    """Make an argument or option from a setting: its description, type and default are the field's.

    Values stay text, which the settings read: so they say themselves what is wrong.
    """
    field = config.model_fields[name]
    text, default = field.description or "", _shown(field.get_default(call_default_factory=True))
    if default and "(default" not in text:
        text += f" (default: {default})"
    annotation: Any
    if field.title is not None:
        annotation = Annotated[str, typer.Argument(metavar=field.title, help=text, show_default=False)]
        return inspect.Parameter(name, KEYWORD, annotation=annotation)
    flag = config.typed(name)
    kinds = get_args(field.annotation)
    kind = kinds[0] if NoneType in kinds else field.annotation
    names = [flag if field.default is False else f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    option = typer.Option(
        *names, help=text, metavar=_metavar(name, kind), rich_help_panel=PANEL_OF.get(name, "Options")
    )
    value = bool if kind is bool else list[str] if name in REPEATABLE else str
    annotation = Annotated[value | None, option]
    return inspect.Parameter(name, KEYWORD, default=None, annotation=annotation)


def _shown(default: Any) -> str:
    """A default as the user would type it; empty if there is none."""
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    if isinstance(default, bool):
        return "on" if default else ""
    return str(default) if isinstance(default, str | int | float | Path) else ""


def _metavar(name: str, kind: Any) -> str:
    """What an option takes: a word, or its choices."""
    if name in METAVARS:
        return METAVARS[name]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "|".join(kind)
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


@contextmanager
def progress_on_stderr(quiet: bool, **options: bool) -> Iterator[Any]:
    """Show progress on stderr; `options` are those of `ConsoleProgress`, which takes a moment to import."""
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet, **options) as progress:
        yield progress


def show(result: Any, as_json: bool, table: str, *parts: Any, also: Collection[str] = ()) -> None:
    """Print a result on stdout.

    Args:
        result: a model of pydantic, which may have a `to_json`.
        as_json: print it as JSON, else as a table.
        table: function of `cli/tables.py` that prints it, after an import that takes seconds.
        parts: further arguments of that function.
        also: properties of the result that its JSON has, too.
    """
    if as_json and hasattr(result, "to_json"):
        print(result.to_json(), end="")
    elif as_json:
        print_json(result.model_dump(mode="json") | {name: getattr(result, name) for name in also})
    else:
        getattr(import_module("llm_barber.cli.tables"), table)(result, *parts)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    print(json.dumps(value, indent=1))
