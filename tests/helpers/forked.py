"""Programs in a process of their own, forked from the tests' process, so that they need not import PyTorch again."""

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


class ForkedProgram:
    """A program that runs until it returns, raises or is killed; its output goes to two files in `folder`."""

    def __init__(self, program: Callable[[], int | None], folder: Path, environment: Mapping[str, str] | None = None):
        self._folder = folder
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(program, folder, environment or {})

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, seconds: float = 60) -> int:
        """Wait for the program's end, and return its exit code; it is killed if it takes longer."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the program did not end within {seconds} s: {self.stderr}")
            time.sleep(0.01)
        return code

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()


def _run(program: Callable[[], int | None], folder: Path, environment: Mapping[str, str]) -> None:
    """Run a program in this process, which was forked for it, and end the process."""
    code: int | None = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
        torch.set_num_threads(1)  # the threads of the other process are not in this one
        os.environ.update(environment)
        code = program()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run_script(path: Path, arguments: list[str]) -> None:
    """Run a file of Python as `python PATH ARGUMENTS` does, in this process."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
