"""Interface for a run's progress: the command line shows it, callers may pass an object of their own."""

from typing import Protocol


class Progress(Protocol):
    """Receiver of a run's progress. All methods return at once."""

    def stage(self, title: str) -> None:
        """Begin a stage of unknown length ("reading calibration text")."""

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """Begin a stage of `total` steps, of which an earlier run finished some: these take no time."""

    def advance(self, detail: str) -> None:
        """Finish a step."""

    def warn(self, message: str) -> None:
        """Warn the user without stopping the run."""


class Silent:
    """Progress that shows nothing."""

    def stage(self, title: str) -> None:
        """Show nothing."""

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """Show nothing."""

    def advance(self, detail: str) -> None:
        """Show nothing."""

    def warn(self, message: str) -> None:
        """Show nothing."""
