"""Write in threads while decoder layers are computed.

`writer.py` has two of these queues. One writes the shard of a layer, then the state that names it. The other writes
activations, and names them in the state once the state has the layers before them. At most one shard and one file of
activations wait to be written, so that memory is bounded.
"""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

Written = Future[None]


class WriteBehind:
    """A queue of writes, done one after the other in threads that do not keep an interrupted program from ending.

    After a write that failed nothing more is written.
    """

    def __init__(self) -> None:
        self._last: Written | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once all that was begun before is written."""
        before, self._last = self._last, Future()
        Thread(target=_fulfil, args=(before, self._last, write), name="write behind", daemon=True).start()

    @property
    def last(self) -> Written | None:
        """The write that was begun last; None: nothing was."""
        return self._last

    @property
    def busy(self) -> bool:
        """True while something is being written."""
        return self._last is not None and not self._last.done()

    def wait(self) -> None:
        """Wait until all is written. An interruption ends the waiting, and not the writing.

        Raises:
            OSError: the data could not be written.
        """
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """Do not wait, but raise the error of a write that failed.

        Raises:
            OSError: the data could not be written.
        """
        if not self.busy:
            self.wait()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is being written: now, or by the writing thread if nobody waits for it."""
        if self._last is None:
            then()
        else:
            self._last.add_done_callback(lambda _: then())


def _fulfil(before: Written | None, writing: Written, write: Callable[[], None]) -> None:
    try:
        if before is not None:
            before.result()
        write()
    except BaseException as error:
        writing.set_exception(error)
    else:
        writing.set_result(None)
