"""Text that names settings as data: Python users read `rebuild_ratio`, the command line shows `--rebuild-ratio`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import Formatter
from typing import Self


@dataclass(frozen=True)
class SettingName:
    """The name of a setting, with a value where the text means the two together: `refine tune`.

    `inside`: where in the setting's value something is, as 0 for its first item; for Python users only.
    """

    name: str
    value: str | bool | None = None
    inside: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        path = ".".join(map(str, (self.name, *self.inside)))
        return path if self.value is None else f"{path} {self.value}"


class Message(str):
    """Text made of parts, some of them names of settings. As a `str` it is what Python users read."""

    parts: tuple[str | SettingName, ...]

    def __new__(cls, *parts: str | SettingName) -> Self:
        """Join the parts; those of a message among them stay parts."""
        flat = [one for part in parts for one in (part.parts if isinstance(part, Message) else (part,))]
        made = super().__new__(cls, "".join(map(str, flat)))
        made.parts = tuple(flat)
        return made

    @property
    def as_options(self) -> str:
        """The text with each setting's name as the option of that name: `--rebuild-ratio`."""
        return self.rendered(_as_option)

    def rendered(self, render: Callable[[SettingName], str]) -> str:
        """The text with each setting's name as `render` shows it; all else stays as it is."""
        return "".join(render(part) if isinstance(part, SettingName) else part for part in self.parts)


def _as_option(setting: SettingName) -> str:
    option = f"--{setting.name.replace('_', '-')}"
    return option if setting.value is None else f"{option} {setting.value}"


def message(template: str, **values: object) -> Message:
    """Fill in a template; a field that no value is given for is the name of a setting.

    Example: `message("{swaps} are of {refine:swaps}, not of {method}", method="wanda")` has the parts
    `SettingName("swaps")`, `" are of "`, `SettingName("refine", "swaps")`, `", not of "`, `"wanda"`.

    Args:
        template: text with fields, `{name}` or `{name:value}` for a setting.
        values: shown as they are; those that are messages or names of settings stay parts.
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


def joined(separator: str, messages: Iterable[Message]) -> Message:
    """Messages with a separator between each two."""
    parts = [part for one in messages for part in (separator, one)]
    return Message(*parts[1:])
