"""Write in a thread while the next decoder layer is computed."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread


class WriteBehind:
    """A thread that writes one thing at a time; it does not keep an interrupted program from ending."""

    def __init__(self) -> None:
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write; the write before must have been waited for."""
        assert self._writing is None, "wait for the write before"
        self._writing = Future()
        Thread(target=_fulfil, args=(self._writing, write), name="write behind", daemon=True).start()

    @property
    def busy(self) -> bool:
        """True while something is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait until all is written. An interruption ends the waiting, and not the writing.

        Raises:
            OSError: the data could not be written.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except KeyboardInterrupt:
            self._writing = writing
            raise

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is being written: now, or by the writing thread if nobody waits for it."""
        if self._writing is None:
            then()
        else:
            self._writing.add_done_callback(lambda _: then())


def _fulfil(writing: "Future[None]", write: Callable[[], None]) -> None:
    try:
        write()
    except BaseException as error:
        writing.set_exception(error)
    else:
        writing.set_result(None)
