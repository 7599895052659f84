"""The command line: parse → config → call → render.

Data goes to stdout, progress and errors to stderr.
"""

import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from llm_barber.cli.app import app
from llm_barber.errors import BarberError

# Base class of errors in options. Newer versions of typer have a copy of click of their own, so that the class is found
# through typer instead of imported from click.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERRUPTED = 130
# Words in the errors of PyTorch and of the system when memory is refused.
REFUSED_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")

for commands in ("pruning_commands", "measuring_commands"):  # in the order in which --help lists their commands
    import_module(f"llm_barber.cli.{commands}")


def main() -> None:
    """Run the command line, and end the process with the command's exit code."""
    arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--quiet" in arguments:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    code = _main(arguments)
    if code and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # a usual exit could wait for the other processes of the group for ever
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    An error is printed as message and hint, with --debug after its traceback.
    """
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return 1
    except (Exception, KeyboardInterrupt) as error:
        message, hint, code = _explained(error)
        if "--debug" in arguments and isinstance(error, Exception) and not isinstance(error, UsageError):
            traceback.print_exc()
        if message:
            print(f"error: {' '.join(message.splitlines())}\nhint: {hint}", file=sys.stderr)
        return code


def _explained(error: BaseException) -> tuple[str, str, int]:
    """Message, hint and exit code of an error; there is no message where typer has shown the help."""
    if isinstance(error, BarberError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx is not None else "llm-barber"
        return error.format_message(), f"see {command} --help", 2
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        hint = "nothing half-written was left; start again when you like, with --resume where something was kept"
        return "interrupted", hint, INTERRUPTED
    if isinstance(error, MemoryError) or any(words in str(error) for words in REFUSED_MEMORY):
        hint = "use fewer --samples, a shorter --seqlen, a smaller --batch-size, or a limit: prune --memory 8GiB"
        return "out of memory", hint, 1
    if isinstance(error, OSError):
        return str(error), "check the disk and the permissions", 1
    lines = str(error).strip().splitlines() or [""]
    hint = "this is a defect: run again with --debug and report the traceback"
    return f"unexpected {type(error).__name__}: {lines[0]}", hint, 1
