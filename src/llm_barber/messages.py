"""Words that messages share."""

from collections.abc import Sequence

ARGUMENTS = {"model": "MODEL", "dense": "DENSE", "pruned": "PRUNED"}  # settings that are no options


def as_option(name: str) -> str:
    """A setting as the command line writes it. Example: "rebuild_ratio" -> "--rebuild-ratio", "model" -> "MODEL"."""
    return ARGUMENTS.get(name, f"--{name.replace('_', '-')}")


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
