"""Folders that no output may ever replace: the current folder, the home folder, and those above them."""

from pathlib import Path


def folder_in_use(output: Path) -> str | None:
    """Name the part that a folder plays for its user, if no output may ever replace it.

    Args:
        output: absolute path, resolved.

    Returns:
        For example "the current folder"; None: it is a folder like any other.
    """
    try:
        current = Path.cwd().resolve()
    except OSError:  # it was removed
        current = Path("/")
    if output == current:
        return "the current folder"
    if output in current.parents:
        return "a folder above the current folder"
    try:
        home = Path.home().resolve()
    except (OSError, RuntimeError):  # nobody knows where it is
        return None
    if output == home:
        return "the home folder"
    return "a folder above the home folder" if output in home.parents else None
