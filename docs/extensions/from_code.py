"""Pages of the documentation that are written from the code when they are built: a Sphinx extension.

A page has a line `<!-- from code: NAME -->`, in whose place the text of `GENERATED[NAME]` goes. The generators need
the package and nothing of Sphinx, so that a test can run them.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- from code: ([a-z-]+) -->$", re.MULTILINE)
PAGES = {"README.md": "/index.md", "CONTRIBUTING.md": "/contributing.md", "CHANGELOG.md": "/changelog.md"}
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Example")


def setup(app: Any) -> dict[str, bool]:
    """Register the extension."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}


def _fill(app: Any, name: str, source: list[str]) -> None:
    text, count = MARK.subn(lambda match: GENERATED[match.group(1)](), source[0])
    if count:
        app.env.note_reread()  # the code may be another one at the next build
    source[0] = inside_the_docs(text)


def inside_the_docs(text: str) -> str:
    """Links to files of the repository as links to pages of the documentation."""
    text = re.sub(r"\]\(docs/", "](/", text)
    for file, page in PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(file)}(#[\w-]+)?\)", rf"]({page}\1)", text)
    # Other files of the repository are no pages: their names stay, without a link.
    return re.sub(r"\[([^]]+)\]\((?:\.\./)*(?:src|tests|benchmarks|LICENSE|CITATION\.cff)[^)]*\)", r"\1", text)


def repository_file(name: str) -> Callable[[], str]:
    """A generator of a Markdown file at the repository's root."""
    return lambda: (ROOT / name).read_text(encoding="utf-8")


def commands() -> dict[str, Any]:
    """The commands of `llm-barber`, by name."""
    import typer

    from llm_barber.cli import app

    group: Any = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


def command_line() -> str:
    """All commands with their arguments and options, as `--help` has them."""
    lines: list[str] = []
    for name, command in commands().items():
        lines += [f"## {name}", "", *_paragraphs(command.help or "")]
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        lines += ["```", f"llm-barber {name} [OPTIONS] {' '.join(map(_metavar, arguments))}".rstrip(), "```", ""]
        for argument in arguments:
            lines += _definition(f"`{_metavar(argument)}`", argument.help or "")
        signature = inspect.signature(command.callback, eval_str=True)
        kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        for panel, parameters in _panels(command).items():
            lines += [f"**{panel}**", ""]
            for parameter in parameters:
                lines += _definition(_option(parameter, kinds[parameter.name]), _help(parameter))
        examples = [
            line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("llm-barber")
        ]
        if examples:
            lines += ["**Examples**", "", "```", *examples, "```", ""]
    return "\n".join(lines)


def _panels(command: Any) -> dict[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option" and "--help" not in parameter.opts and not parameter.hidden:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    return panels


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any, kind: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    values = parameter.metavar or _values(kind)
    return f"{names} `{values}`" if values else names


def _values(kind: Any) -> str:
    """What an option of this type takes: choices, or a letter; nothing for a flag."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType, list):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return _values(kind)
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind, "VALUE")


def _help(parameter: Any) -> str:
    text = parameter.help or ""
    if parameter.show_default and parameter.default is not None and not callable(parameter.default):
        default = getattr(parameter.default, "value", parameter.default)
        if not isinstance(default, (bool, tuple, list)) and "default:" not in text and "Ellipsis" not in str(default):
            text += f" (default: {default})"
    return text


def python_api() -> str:
    """The public names of the package: functions with their docstrings, settings and results with their fields."""
    import llm_barber

    names = sorted(llm_barber.__all__, key=str.lower)
    values = {name: getattr(llm_barber, name) for name in names}
    functions = {name: value for name, value in values.items() if inspect.isfunction(value)}
    errors = {name: value for name, value in values.items() if inspect.isclass(value) and issubclass(value, Exception)}
    settings = {name: value for name, value in values.items() if name.endswith("Config")}
    results = {name: value for name, value in values.items() if name not in {*functions, *errors, *settings}}
    lines = ["## Functions", ""]
    for name, value in functions.items():
        lines += [f"### {name}", "", "```python", _signature(name, value), "```", "", *_docstring(value)]
    for title, classes in (("Settings", settings), ("Results", results), ("Errors", errors)):
        lines += [f"## {title}", ""]
        for name, value in classes.items():
            lines += [f"### {name}", "", *_docstring(value), *_fields(value), *_properties(value)]
    return "\n".join(lines)


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parts = [_parameter(parameter) for parameter in signature.parameters.values()]
    result = _type(signature.return_annotation)
    short = f"{name}({', '.join(parts)}) -> {result}"
    if len(short) <= 88:
        return short
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f") -> {result}"])


def _parameter(parameter: inspect.Parameter) -> str:
    text = f"{parameter.name}: {_type(parameter.annotation)}"
    return text if parameter.default is inspect.Parameter.empty else f"{text} = {parameter.default!r}"


def _type_argument(argument: Any) -> str:
    """What stands in the brackets of a type: a type, `…`, or the list of a callable's parameters."""
    if argument is Ellipsis:
        return "…"
    return f"[{', '.join(map(_type, argument))}]" if isinstance(argument, list) else _type(argument)


def _type(annotation: Any) -> str:
    """An annotation as people write it: without modules, without the checks of pydantic."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] if annotation.count("[") == 0 else annotation
    if annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin is not None and arguments:
        inner = ", ".join(_type_argument(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', str(origin))}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _fields(kind: Any) -> list[str]:
    lines: list[str] = []
    for name, field in getattr(kind, "model_fields", {}).items():
        head = f"`{name}`: {_type(field.annotation).replace('|', 'or')}"
        if not field.is_required():
            head += f" = `{_plain(field.get_default(call_default_factory=True))!r}`"
        lines += _definition(head, field.description or "")
    return [*lines, ""]


def _plain(value: Any) -> Any:
    """A default without the names of enums."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.value if isinstance(value, Enum) else value


def _properties(kind: Any) -> list[str]:
    lines: list[str] = []
    for name, value in vars(kind).items():
        if isinstance(value, property) and not name.startswith("_") and value.__doc__:
            lines += _definition(f"`{name}` (property)", " ".join(value.__doc__.split()))
    return lines


def _definition(term: str, text: str) -> list[str]:
    text = " ".join(text.split())
    return [term, f": {_escaped(text)}", ""] if text else [f"- {term}"]


def _escaped(text: str) -> str:
    """Text of a docstring in Markdown: no HTML, no emphasis by accident."""
    parts = text.split("`")  # what lies between two backticks is code
    parts[::2] = [re.sub(r"([<>*_\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines += [_escaped(" ".join(paragraph.split())), ""]
    return lines


def _docstring(value: Any) -> list[str]:
    """A docstring with its sections `Args:`, `Raises:` as lists."""
    lines: list[str] = []
    for title, text in _sections(inspect.getdoc(value) or ""):
        if not title:
            lines += _paragraphs(text)
            continue
        lines += [f"*{title}*", ""]
        for item in re.split(r"\n(?=\S)", inspect.cleandoc(text)):
            name, colon, meaning = item.partition(":")
            lines += _definition(f"`{name.strip()}`", meaning) if colon else _paragraphs(item)
    return lines


def _sections(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(rf"^({'|'.join(SECTIONS)}):[ ]*\n", text, flags=re.MULTILINE)
    yield "", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "python-api": python_api,
    "readme": repository_file("README.md"),
    "contributing": repository_file("CONTRIBUTING.md"),
    "changelog": repository_file("CHANGELOG.md"),
}
