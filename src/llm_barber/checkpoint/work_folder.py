"""The work folder: a run writes its output in it, beside the output's name, and holds its lock."""

from contextlib import suppress
from pathlib import Path

from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.folder import make_locked
from llm_barber.checkpoint.output import check_output, remove_marked, work_folder
from llm_barber.errors import OutputError


class WorkFolder:
    """The work folder of an output, and the lock in it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = work_folder(output)

    def make(self, overwrite: bool) -> None:
        """Make the folder and its parents, and hold its lock.

        Raises:
            OutputError: another run holds the lock, the folder cannot be written, or another run has finished the
                output meanwhile.
        """
        self._made_parents = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.lock = make_locked(self.path, LOCK_NAME, self.output)
        except OutputError:
            self.remove_parents()
            raise
        try:
            self._check_again(overwrite)
        except BaseException:
            self.lock.release()
            raise

    def _check_again(self, overwrite: bool) -> None:
        """Check the output now that the lock is held: another run may have finished it before.

        Raises:
            OutputError: another run has finished the output.
        """
        try:
            check_output(self.output, overwrite)
        except OutputError:
            if [path.name for path in self.path.iterdir()] == [LOCK_NAME]:
                self.remove()
            raise

    def remove(self) -> None:
        """Remove the folder with its content; the lock is still held.

        Raises:
            OSError: the folder cannot be removed.
        """
        remove_marked(self.path, LOCK_NAME)

    def remove_parents(self) -> None:
        """Remove the folders that were made for the work folder, as far as they are empty."""
        with suppress(OSError):
            for folder in self._made_parents:
                folder.rmdir()
