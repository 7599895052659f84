"""Words for wrong values: what was given, and what would be right.

Pydantic finds the problem and names its type; its own words ("Input should be a valid integer, unable to parse string
as an integer") are written for programmers.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

LONGEST_SHOWN = 80  # characters of a value that are shown
# By pydantic's type of problem. Fields: the given `value`, with quotes if it is text; `choices`; bounds.
WORDS = {
    "missing": "is missing: give it a value",
    "too_short": "is empty: name at least one",
    "int_type": "{value} is not a whole number",
    "int_parsing": "{value} is not a whole number",
    "int_from_float": "{value} is not a whole number",
    "int_parsing_size": "{value} has too many digits",
    "float_type": "{value} is not a number",
    "float_parsing": "{value} is not a number",
    "finite_number": "{value} is not a finite number",
    "bool_type": "{value} is neither true nor false",
    "bool_parsing": "{value} is neither true nor false",
    "string_type": "{value} is not text",
    "string_unicode": "{value} is not text",
    "path_type": "{value} is not a path",
    "tuple_type": "{value} is not a list",
    "dict_type": "{value} is not a mapping",
    "dataclass_type": "{value} is not of type {class_name}",
    "enum": "{value} is not one of {choices}",
    "greater_than_equal": "{value} is too small: the least is {ge}",
    "greater_than": "{value} is too small: it must be above {gt}",
    "less_than_equal": "{value} is too large: the most is {le}",
    "less_than": "{value} is too large: it must be below {lt}",
}


def wording(problem: Mapping[str, Any], settings: Collection[str]) -> str:
    """Say what is wrong with a value, after the setting's name; in pydantic's words if its type is not in `WORDS`.

    Example: {"type": "less_than_equal", "input": 2, "ctx": {"le": 1}, …} -> "2 is too large: the most is 1".

    Args:
        problem: an item of `ValidationError.errors()`.
        settings: names of the settings that there are.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":  # of a validator of this program, which says what was given
        return str(context["error"])
    if kind == "extra_forbidden":
        return "there is no such setting" + _nearest(str(problem["loc"][0]), settings)
    is_bound = kind.startswith(("greater", "less"))
    value = _shown(problem["input"], quoted=not is_bound)
    if kind not in WORDS:
        return f"{problem['msg']} (given: {value})"
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
    choices = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    words = WORDS[kind].format(**{"value": value, "choices": choices, **bounds})
    return words + _nearest(str(problem["input"]), choices.split(", ")) if kind == "enum" else words


def _nearest(name: str, names: Collection[str]) -> str:
    """Ask for the name that looks most like the given one, if one does."""
    nearest = get_close_matches(name, names, n=1)
    return f": did you mean {nearest[0]}?" if nearest else ""


def _shown(value: Any, quoted: bool) -> str:
    """A value as its user wrote it, shortened."""
    try:
        text = repr(value) if quoted else str(value)
    except ValueError:  # Python refuses to show numbers with more than 4300 digits
        text = "the number"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
