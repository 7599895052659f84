"""How a run tells where it is; the command line renders it, a caller may pass an object of its own."""

from typing import Protocol


class Progress(Protocol):
    """Told what a run does. All methods return at once."""

    def stage(self, title: str) -> None:
        """A stage of unknown length begins ("reading calibration text")."""

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """A stage of `total` steps begins, of which an earlier run finished some: these take no time now."""

    def advance(self, detail: str) -> None:
        """A step is done."""

    def warn(self, message: str) -> None:
        """Something that the user should know, and that does not stop the run; a `Message` where it names settings."""


class Silent:
    """Says nothing."""

    def stage(self, title: str) -> None:
        """Say nothing."""

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """Say nothing."""

    def advance(self, detail: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing."""
