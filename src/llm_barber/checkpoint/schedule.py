"""Choose the layers after which activations are written: seldom enough that writing hides behind computing.

A run that resumes passes the text through the finished layers since the last file once more, which costs a small part
of what pruning them cost. So a file need not follow each layer.
"""

import time
from collections.abc import Callable

SHARE = 0.1  # of the run's time in which activations are written, at most, where `MOST_LAYERS` allows it
MOST_LAYERS = 8  # from one file to the next, unless writing a file takes longer than these layers


class Schedule:
    """Seconds that files of activations take, and the layers that pass between two of them.

    Example: a layer takes 5 s, a file 2 s -> after layers 1, 5, 9, …: 20 s pass, of which 2 s are a tenth.

    Args:
        clock: seconds on a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: float | None = None  # that the last file took; None: no file was written yet
        self._began = 0.0
        self._layers = 0

    def begin_if_due(self, layers: int) -> bool:
        """Tell whether to write a file after the first `layers` layers; if so, it begins now.

        The file before must be complete.
        """
        clock_time = self._clock()
        is_cheap = self._seconds is None or self._seconds <= SHARE * (clock_time - self._began)
        is_due = is_cheap or layers - self._layers >= MOST_LAYERS
        if is_due:
            self._began, self._layers = clock_time, layers
        return is_due

    def end(self) -> None:
        """Note that the file is complete."""
        self._seconds = self._clock() - self._began
