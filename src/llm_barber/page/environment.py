"""What all pages share: the templates, and how numbers are written for people."""

import math
from functools import cache
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SPACE = "\u202f"  # narrow, and no line breaks at it
MISSING = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@cache  # it keeps what it has compiled
def environment() -> Environment:
    """The templates of all pages, with the filters that write numbers for people; everything else is escaped."""
    made = Environment(
        loader=PackageLoader("llm_barber.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "percent": percent,
        "with_error": with_error,
        "duration": duration,
        "memory": memory,
        "hash": _hash,
        "plain": plain,
    }
    return made


def number(value: float | None) -> str:
    """A number with four significant digits and thousands separators; whole numbers with all their digits."""
    if value is None:
        return MISSING
    if isinstance(value, int) or not math.isfinite(value) or abs(value) >= 999.95:  # which is written 1,000
        return f"{value:,.0f}".replace("-", "−")
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:#.4g}".rstrip(".").replace("-", "−")
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa}{SPACE}×{SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")


def percent(share: float | None, decimals: int = 2, sign: bool = False) -> str:
    """A share (0…1) in percent; with a sign, if it is a difference. What is too small to write is not made zero."""
    if share is None or math.isnan(share):
        return MISSING
    if not sign and 0 < 100 * share < 0.5 * 10**-decimals:
        return f"<{SPACE}{10**-decimals:.{decimals}f}{SPACE}%"
    return f"{100 * share:{'+' if sign else ''},.{decimals}f}{SPACE}%".replace("-", "−")


def with_error(share: float, standard_error: float, sign: bool = False) -> str:
    """A share and its standard error (both 0…1) in percent; with a sign, if it is a difference."""
    return f"{percent(share, sign=sign).removesuffix(SPACE + '%')} ± {percent(standard_error)}"


def duration(seconds: float) -> str:
    """A time in the units that people use for it."""
    if seconds < 59.995:  # which is written 60
        return f"{number(seconds)}{SPACE}s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours == 0:
        return f"{minutes}{SPACE}min {round(seconds) % 60}{SPACE}s"
    return f"{hours:,}{SPACE}h {minutes % 60}{SPACE}min"


def memory(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{number(size / 2**30)}{SPACE}GiB"


def plain(value: object) -> object:
    """A setting as people would write it: lists and mappings without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def model_name(model: str) -> str:
    """What people call a model: the last part of a path, a hub id as it is."""
    path = PurePath(model)
    return path.name or model if path.is_absolute() or model.startswith((".", "~")) else model


def _hash(digest: str | None) -> Markup | str:
    return Markup('<code class="hash">{}</code>').format(digest) if digest else MISSING
