"""Messages whose parts are text and names of settings.

Python users read `rebuild_ratio`, the command line shows `--rebuild-ratio`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Self


@dataclass(frozen=True)
class SettingName:
    """Name of a setting, or of a setting with a value: `refine tune`.

    `inside`: path of a part of the setting's value, for example 0 for its first item; for Python users only.
    """

    name: str
    value: str | bool | None = None
    inside: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        path = ".".join(map(str, (self.name, *self.inside)))
        return path if self.value is None else f"{path} {self.value}"


class Message(str):
    """Text with names of settings among its parts; as a `str` it reads as Python users see it."""

    parts: tuple[str | SettingName, ...]

    def __new__(cls, *parts: str | SettingName) -> Self:
        """Join the parts; a message among them adds its parts."""
        flat: list[str | SettingName] = []
        for part in parts:
            flat.extend(part.parts if isinstance(part, Message) else [part])
        text = super().__new__(cls, "".join(map(str, flat)))
        text.parts = tuple(flat)
        return text

    @property
    def as_options(self) -> str:
        """Text with settings as options: `--rebuild-ratio`."""
        return self.rendered(_as_option)

    def rendered(self, render: Callable[[SettingName], str]) -> str:
        """Text with each setting as `render` shows it; the other parts stay as they are."""
        return "".join(render(part) if isinstance(part, SettingName) else part for part in self.parts)


def _as_option(setting: SettingName) -> str:
    """Show a setting as its option, with its value if it has one; a switch that is off as `--no-rebuild`."""
    option = f"--{setting.name.replace('_', '-')}"
    if isinstance(setting.value, bool):
        return option if setting.value else f"--no-{option[2:]}"
    return option if setting.value is None else f"{option} {setting.value}"


def message(template: str, **values: object) -> Message:
    """Fill in a template; a field without a value is the name of a setting.

    Example: `message("{swaps} are of {refine:swaps}, not of {method}", method="wanda")` has the parts
    `SettingName("swaps")`, `" are of "`, `SettingName("refine", "swaps")`, `", not of "`, `"wanda"`.

    Args:
        template: text with fields, `{name}` or `{name:value}` for a setting.
        values: values of the other fields; messages and names of settings among them stay parts.
    """
    parts: list[str | SettingName] = []
    formatter = Formatter()
    for text, name, spec, conversion in formatter.parse(template):
        if text:
            parts.append(text)
        if name is None:
            continue
        if name not in values:
            parts.append(SettingName(name, spec or None))
        elif isinstance(value := values[name], Message | SettingName):
            parts.append(value)
        else:
            parts.append(format(formatter.convert_field(value, conversion), spec or ""))  # type: ignore[arg-type]
    return Message(*parts)


def marked(text: str) -> Message:
    """Make names in backticks settings.

    Example: "Seed of what `temperature` draws" has the parts `"Seed of what "`, `SettingName("temperature")`,
    `" draws"`; `refine swaps` in backticks is `SettingName("refine", "swaps")`.
    """
    parts: list[str | SettingName] = []
    for number, part in enumerate(re.split(r"`([^`]+)`", text)):
        name, _, value = part.partition(" ")
        parts.append(SettingName(name, value or None) if number % 2 else part)
    return Message(*parts)


def joined(separator: str, messages: Iterable[Message]) -> Message:
    """Join messages with a separator between each two."""
    parts = [part for text in messages for part in (separator, text)]
    return Message(*parts[1:])


def counted(count: int, noun: str) -> str:
    """A number of things. Example: (2, "window") -> "2 windows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_names(names: Sequence[str], shown: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def ranges(numbers: list[int]) -> str:
    """Join ascending numbers; consecutive numbers become a range.

    Example: [0, 1, 2, 5] -> "0-2, 5".
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
