"""Templates of all pages, and the filters that format numbers for people."""

import math
from functools import cache
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SPACE = "\u202f"  # a narrow space at which no line breaks
MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    templates.filters |= {
        "number": number,
        "percent": percent,
        "with_error": with_error,
        "duration": duration,
        "memory": memory,
        "hash": _hash,
        "plain": plain,
    }
    return templates


def number(value: float | None) -> str:
    """Format a number with four significant digits and thousands separators.

    Whole numbers have all their digits.
    """
    if value is None:
        return MISSING
    if isinstance(value, int) or not math.isfinite(value) or abs(value) >= 999.95:  # rounds to 1,000
        return f"{value:,.0f}".replace("-", "−")
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:#.4g}".rstrip(".").replace("-", "−")
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}{SPACE}×{SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")


def percent(share: float | None, decimals: int = 2, sign: bool = False) -> str:
    """Format a share (0…1) in percent, with a sign if it is a difference.

    A share that would round to zero is written as less than the smallest number of these decimals.
    """
    if share is None or math.isnan(share):
        return MISSING
    if not sign and 0 < 100 * share < 0.5 * 10**-decimals:
        return f"<{SPACE}{10**-decimals:.{decimals}f}{SPACE}%"
    return f"{100 * share:{'+' if sign else ''},.{decimals}f}{SPACE}%".replace("-", "−")


def with_error(share: float, standard_error: float, sign: bool = False) -> str:
    """Format a share and its standard error (both 0…1) in percent, with a sign if it is a difference."""
    return f"{percent(share, sign=sign).removesuffix(SPACE + '%')} ± {percent(standard_error)}"


def duration(seconds: float) -> str:
    """Format seconds in the units that people use for such a time."""
    if seconds < 59.995:  # rounds to 60
        return f"{number(seconds)}{SPACE}s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours == 0:
        return f"{minutes}{SPACE}min {round(seconds) % 60}{SPACE}s"
    return f"{hours:,}{SPACE}h {minutes % 60}{SPACE}min"


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


def _hash(digest: str | None) -> Markup | str:
    return Markup('<code class="hash">{}</code>').format(digest) if digest else MISSING
