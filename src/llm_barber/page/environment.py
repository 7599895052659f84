"""Templates of all pages, and the filters that format numbers for people."""

import math
from datetime import timedelta
from functools import cache
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined

SPACE = "\u202f"  # a narrow space at which no line breaks
MISSING = "–"


@cache  # the environment keeps compiled templates
def environment() -> Environment:
    """The templates of all pages, with the filters that format numbers; everything else is escaped."""
    templates = Environment(
        loader=PackageLoader("llm_barber.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for form in (number, percent, with_error, duration, memory, plain):
        templates.filters[form.__name__] = form
    return templates


def number(value: float | None) -> str:
    """Format a number with four significant digits, a whole number with all its digits and thousands separators."""
    if value is None:
        return MISSING
    if isinstance(value, int) or abs(value) >= 999.95:  # rounds to 1,000
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".")


def percent(share: float | None, decimals: int = 2, sign: bool = False) -> str:
    """Format a share (0…1) in percent, with a sign if it is a difference."""
    if share is None or math.isnan(share):
        return MISSING
    return f"{100 * share:{'+' if sign else ''},.{decimals}f}{SPACE}%"


def with_error(share: float, standard_error: float, sign: bool = False) -> str:
    """Format a share and its standard error (both 0…1) in percent, with a sign if it is a difference."""
    return f"{percent(share, sign=sign).removesuffix(SPACE + '%')} ± {percent(standard_error)}"


def duration(seconds: float) -> str:
    """Format seconds; a minute and more as hours, minutes and seconds. Example: 754.2 -> "0:12:34"."""
    return f"{number(seconds)}{SPACE}s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def memory(size: int) -> str:
    """Format bytes in GiB."""
    return f"{number(size / 2**30)}{SPACE}GiB"


def plain(value: object) -> object:
    """Format a setting as people would write it: lists and mappings without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def model_name(model: str) -> str:
    """Short name of a model: the last part of a path, or the whole hub id."""
    path = PurePath(model)
    return path.name or model if path.is_absolute() or model.startswith((".", "~")) else model
