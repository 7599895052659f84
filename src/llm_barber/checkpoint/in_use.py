"""Folders that no output may ever replace: the current folder, the home folder, and those above them."""

from pathlib import Path


def folder_in_use(output: Path) -> str | None:
    """Describe a folder that no output may ever replace.

    Args:
        output: absolute path, resolved.

    Returns:
        For example "the current folder"; None: the folder may be replaced.
    """
    try:
        current = Path.cwd().resolve()
    except OSError:  # it has been removed
        current = Path("/")
    if output == current:
        return "the current folder"
    if output in current.parents:
        return "a folder above the current folder"
    try:
        home = Path.home().resolve()
    except (OSError, RuntimeError):  # it is unknown
        return None
    if output == home:
        return "the home folder"
    return "a folder above the home folder" if output in home.parents else None
