"""Write activations while layers are computed, so that no layer waits for them."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event

from torch import Tensor

from llm_barber.checkpoint.activations import Activations, save_activations
from llm_barber.checkpoint.behind import WriteBehind, Written
from llm_barber.checkpoint.schedule import Schedule


class ActivationWriter:
    """Writes one file of activations at a time, in a thread, as seldom as the schedule says.

    Args:
        folder: the folder of the files.
        claim: makes the state name a durable file, and removes files that it names no more; called by the thread.
    """

    def __init__(self, folder: Path, claim: Callable[[Activations], None]) -> None:
        self._folder = folder
        self._claim = claim
        self._behind = WriteBehind()
        self._schedule = Schedule()
        self._unneeded = Event()
        self._streams: Mapping[str, Tensor] = {}  # freed by the main thread: `ArrayMemory` counts what is freed

    @property
    def busy(self) -> bool:
        """True while activations are being written."""
        return self._behind.busy

    @property
    def unwritten(self) -> tuple[Tensor, ...]:
        """Arrays that are being written, and must not change."""
        if not self.busy:
            self._streams = {}
        return tuple(self._streams.values())

    def begin_if_due(self, layers: int) -> bool:
        """Tell whether to write the activations after the first `layers` layers now, without waiting.

        Raises:
            OSError: the activations before could not be written.
        """
        self._behind.check()
        return not self.busy and self._schedule.begin_if_due(layers)

    def start(self, layers: int, streams: Mapping[str, Tensor], after: Written | None) -> None:
        """Begin to write the activations after the first `layers` layers.

        Args:
            layers: number of layers that they have passed.
            streams: in host memory; they must not change as long as they are among the `unwritten` arrays.
            after: the write of the state that has these layers; the file is claimed after it.
        """
        self._streams = streams
        self._behind.start(partial(self._save, layers, after))

    def _save(self, layers: int, after: Written | None) -> None:
        saved = save_activations(self._folder, layers, self._streams, self._unneeded)
        self._schedule.end()
        if after is not None:
            after.result()
        self._claim(saved)

    def wait(self) -> None:
        """Wait until the activations that are being written are durable, and named by the state.

        Raises:
            OSError: they could not be written.
        """
        self._behind.wait()

    def stop(self) -> None:
        """Stop writing: all layers are finished."""
        self._unneeded.set()
        with suppress(Exception):
            self.wait()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is being written: now, or by the writing thread if nobody waits for it."""
        self._behind.when_done(then)
