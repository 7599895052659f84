"""Options of the command line, made from the fields of settings classes.

An option has the description of its field as help text, and the field's default and type. This module adds only the
panel of `--help` that shows the option, and its metavar where that of the type would not be clear.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from llm_barber.messages import SettingName, marked
from llm_barber.settings.base import CommaSeparated
from llm_barber.settings.checked import Settings

CALIBRATION, TEXT, OUTPUT = "Calibration", "Text", "Output"
# Panels of `--help` and their settings, both in the order that is shown. Settings without a panel are shown first.
PANELS: dict[str, tuple[str, ...]] = {
    "Method": (
        "methods", "targets", "preset", "sparsity", "pattern", "initial", "initial_granularity", "keep_updates",
        "allocation", "reorder", "rebuild", "granularity", "rebuild_ratio",
    ),
    "Quality": ("refine", "swaps", "reconstruct", "tune_passes", "tune_windows", "target_mix", "guard"),
    CALIBRATION: ("calibration", "samples", "seqlen", "bos", "max_new_tokens", "temperature", "seed", "seeds"),
    TEXT: ("text", "text_seqlen", "windows", "chat", "against"),
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
IN_PANELS = [name for names in PANELS.values() for name in names]
METAVARS = {
    "against": "DENSE", "allocation": "SPREAD", "blocks": "FILE", "calibration": "NAME|FILE",
    "checks": "NAME,…",
    "dense": "DENSE", "exclude": "REGEX", "gbps": "GB/S", "include": "REGEX", "methods": "NAME,…",
    "pattern": "N:M", "prompt": "TEXT", "reconstruct": "HOW", "seeds": "SEED,…", "skip_layers": "N,…",
    "sparsities": "FILE", "targets": "TARGET,…", "tasks": "NAME,…", "text": "NAME|FILE", "tflops": "TFLOP/S",
    "dtype": "DTYPE", "device": "DEVICE",
    "revision": "REVISION", "dense_revision": "REVISION", "pruned_revision": "REVISION",
    "granularity": "SET", "initial_granularity": "SET", "initial": "METHOD", "layers": "PATH",
    "model": "MODEL", "tasks_folder": "FOLDER", "memory": "SIZE", "device_memory": "SIZE",
}  # fmt: skip
WIDEST_CHOICES = 15  # most characters of choices that are shown beside the option's name

DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check and describe the run, write nothing", rich_help_panel=OUTPUT),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress", rich_help_panel=OUTPUT)]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say which instructions and packed linears are used", rich_help_panel=OUTPUT),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors", rich_help_panel=OUTPUT)]


def parameters_of(
    config: type[Settings], arguments: Mapping[str, str], python_only: Collection[str]
) -> list[inspect.Parameter]:
    """Make a typer command's parameters from the fields of its settings.

    Arguments come first, then options, panel by panel.

    Args:
        config: class of the command's settings.
        arguments: metavars of the arguments, by the names of their fields.
        python_only: names of fields that the command line does not take.
    """
    fields = config.model_fields
    options = [name for name in fields if name not in arguments and name not in python_only]
    options.sort(key=lambda name: IN_PANELS.index(name) if name in IN_PANELS else -1)
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    if "calibration" not in fields:  # the command's windows come from the measured texts
        panel_of |= dict.fromkeys(PANELS[CALIBRATION], TEXT)
    typed = {**arguments} | {name: f"--{name.replace('_', '-')}" for name in options}

    def parameter(name: str, annotation: Any) -> inspect.Parameter:
        default = inspect.Parameter.empty if fields[name].is_required() else _default(fields[name])
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    return [
        *(parameter(name, _argument(fields[name], metavar, typed)) for name, metavar in arguments.items()),
        *(parameter(name, _option(name, fields[name], panel_of.get(name), typed)) for name in options),
    ]


def _argument(field: FieldInfo, metavar: str, typed: Mapping[str, str]) -> Any:
    """Annotate an argument for typer."""
    text = _as_typed(field.description or "", typed)
    return Annotated[_kind(field), typer.Argument(metavar=metavar, help=text, show_default=False)]


def _option(name: str, field: FieldInfo, panel: str | None, typed: Mapping[str, str]) -> Any:
    """Annotate an option for typer: type, help text, metavar, panel, and a name that typer would not choose."""
    kind, default = _kind(field), _default(field)
    metavar, choices = _metavar(name, kind)
    names = []
    if kind is bool:
        names = [typed[name] if default is False else f"{typed[name]}/--no-{typed[name].removeprefix('--')}"]
    text = _with_choices_and_default(_as_typed(field.description or "", typed), choices, default)
    option = typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)
    typer_kind = _typer_kind(kind)
    return Annotated[typer_kind | None if default is None else typer_kind, option]


def _kind(field: FieldInfo) -> Any:
    """Type of a field as the user types it: text for lists and sizes, a path for settings from a file."""
    (kind,) = (kind for kind in _alternatives(field.annotation) if kind is not type(None))
    if kind is ByteSize or any(isinstance(mark, CommaSeparated) for mark in field.metadata):
        return str
    if kind in (bool, int, float, str, Path) or (isinstance(kind, type) and issubclass(kind, StrEnum)):
        return kind
    return list[str] if get_origin(kind) is tuple and get_args(kind)[0] is str else Path


def _typer_kind(kind: Any) -> Any:
    """Type for typer: numbers and choices are text, which the settings read, so that all problems are told together."""
    is_choice = isinstance(kind, type) and issubclass(kind, StrEnum)
    return str if kind in (int, float) or is_choice else kind


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Types of a union, without their constraints."""
    if get_origin(annotation) in (Union, UnionType):
        for kind in get_args(annotation):
            yield from _alternatives(kind)
    elif get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


def _default(field: FieldInfo) -> Any:
    """Default of a field as the user would type it; None if the default is None or empty."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or None
    return None if default == {} else default


def _as_typed(description: str, typed: Mapping[str, str]) -> str:
    """Replace settings in backticks by options and arguments: `refine swaps` by --refine swaps."""

    def render(setting: SettingName) -> str:
        return str(replace(setting, name=typed.get(setting.name, setting.name)))

    return marked(description).rendered(render)


def _with_choices_and_default(text: str, choices: str, default: Any) -> str:
    """Add the choices to a help text, unless it lists them after a colon, and the default, unless it mentions it."""
    sentence, mark, rest = text.partition(" (default")
    if not mark and default is not None and default is not False:
        shown = "on" if default is True else str(default).replace(",", ", ")
        mark, rest = " (default", f": {shown})"
    return f"{sentence}{f': {choices}' if choices and ': ' not in sentence else ''}{mark}{rest}"


def _metavar(name: str, kind: Any) -> tuple[str | None, str]:
    """Metavar of an option, and its choices for the help text if they are too long for a metavar."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        choices = "|".join(kind)
        if len(choices) <= WIDEST_CHOICES or name not in METAVARS:
            return choices, ""
        return METAVARS[name], ", ".join(kind)
    default = {bool: None, int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
    return METAVARS.get(name, default), ""
