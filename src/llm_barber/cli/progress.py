"""Progress with an ETA on stderr, and warnings."""

import logging
import re
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends
LOGGER = logging.getLogger("llm_barber")
PLAIN_INTERVAL = 2.0  # seconds between lines where there is no terminal


class ConsoleProgress:
    """Progress on stderr: a bar on a terminal, elsewhere a line per step, at most one every few seconds.

    Args:
        quiet: show warnings only.
        muted: show nothing, since another process of the run shows the warnings.
        verbose: show what the package logs, too.
    """

    def __init__(self, quiet: bool = False, muted: bool = False, verbose: bool = False) -> None:
        self._muted = muted
        self.console = Console(stderr=True, quiet=quiet or muted, highlight=False, markup=False)
        self.live = self.console.is_terminal and not (quiet or muted)
        # This column takes the rest of the terminal's width.
        detail = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bars = Bars(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", "dim", markup=False, table_column=detail),
            console=self.console,
            transient=True,
            expand=True,
            disable=not self.live,
        )
        self._task: TaskID | None = None
        self._title, self._total, self._done, self._finished = "", 0, 0, 0
        self._began = self._told = 0.0
        self._log = _Log(self, logging.INFO if verbose else logging.WARNING)

    def __enter__(self) -> Self:
        LOGGER.setLevel(self._log.level)
        LOGGER.addHandler(self._log)
        self._bars.start()
        self.stage("loading PyTorch and transformers")
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as transformers_logging

        # Bars and messages of libraries would interrupt this progress.
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        LOGGER.removeHandler(self._log)

    def stage(self, title: str) -> None:
        """Begin a stage of unknown length."""
        self._clear()
        self.console.print(title, style="dim", soft_wrap=True)

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """Begin a stage of `total` steps; the ETA ignores the steps that an earlier run finished."""
        self._clear()
        self._title, self._total, self._done, self._finished = title, total, finished, finished
        self._began = self._told = time.monotonic()
        if self.live:
            self._task = self._bars.add_task(title, total=total, completed=finished, detail="")

    def advance(self, detail: str) -> None:
        """Finish a step."""
        self._done += 1
        if self._task is not None:
            self._bars.update(self._task, advance=1, detail=detail)
            return
        time_now = time.monotonic()
        elapsed = time_now - self._began
        if time_now - self._told >= PLAIN_INTERVAL or (self._done == self._total and elapsed >= PLAIN_INTERVAL):
            self._told = time_now
            left = elapsed / (self._done - self._finished) * (self._total - self._done)
            self.console.print(
                f"{self._title} {self._done}/{self._total}, ETA {left:.0f} s{': ' if detail else ''}{detail}",
                soft_wrap=True,
            )

    def warn(self, message: str) -> None:
        """Show a warning, even if quiet."""
        if self._muted:
            return
        console = Console(stderr=True, highlight=False, markup=False) if self.console.quiet else self.console
        console.print(f"warning: {message}", style="yellow", soft_wrap=True)

    def write(self, text: str) -> None:
        """Write text on stdout as it is, without a line end; the bar is gone from then on.

        A terminal's control characters are replaced, since a model may write any character.
        """
        self._bars.stop()
        stream = sys.stdout
        shown = CONTROL.sub("�", text) if stream.isatty() else text
        encoding = stream.encoding or "utf-8"
        stream.write(shown.encode(encoding, "replace").decode(encoding))
        stream.flush()

    def _clear(self) -> None:
        """Remove the bar of the previous stage."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


class _Log(logging.Handler):
    """Show log messages of a level and above beside the progress."""

    def __init__(self, progress: ConsoleProgress, level: int) -> None:
        super().__init__(level)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message as a line, a warning as all warnings are."""
        if record.levelno >= logging.WARNING:
            self._progress.warn(record.getMessage())
        else:
            self._progress.console.print(record.getMessage(), style="dim", soft_wrap=True)
