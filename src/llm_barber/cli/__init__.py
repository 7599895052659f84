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
from llm_barber.cli.typed import as_typed, empty_argument, find_command
from llm_barber.errors import BarberError, SettingsError
from llm_barber.messages import Message

# Base class of errors in options. Newer versions of typer have a copy of click of their own, so that the class is found
# through typer instead of imported from click.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERRUPTED = 130
# Words in the errors of PyTorch and of the system when memory is refused.
REFUSED_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")
INTERRUPTED_HINT = "nothing half-written was left; start again when you like, with --resume where something was kept"
OUT_OF_MEMORY_HINT = "use fewer --samples, a shorter --seqlen, a smaller --batch-size, or a limit: prune --memory 8GiB"

# Imported in the order in which --help lists their commands.
for commands in ("pruning_commands", "planning_commands", "checkpoint_commands", "measuring_commands"):
    import_module(f"llm_barber.cli.{commands}")


def main() -> None:
    """Run the command line, and end the process with the command's exit code."""
    arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--quiet" in arguments:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, _terminated)
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
    debug = "--debug" in arguments
    try:
        if empty := empty_argument(arguments):
            raise SettingsError(f"{empty} is empty", "give it a value; is a variable of the shell not set?")
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BarberError as error:
        if debug:
            error.__notes__.remove(f"hint: {error.hint}")  # it follows below
            traceback.print_exc()
        message, hint = (_with_typed_settings(text, arguments) for text in (error.message, error.hint))
        return _tell(message, hint, error.exit_code)
    except UsageError as error:
        if not error.format_message():  # there are no arguments, and typer has shown the help
            return 2
        return _tell(error.format_message(), f"see {_command_path(error, arguments)} --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _tell("interrupted", INTERRUPTED_HINT, INTERRUPTED)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_out_of_memory(error):
            return _tell("out of memory", OUT_OF_MEMORY_HINT, 1)
        if isinstance(error, OSError):
            return _tell(str(error), "check the disk and the permissions", 1)
        lines = str(error).strip().splitlines()
        return _tell(
            f"unexpected {type(error).__name__}: {lines[0] if lines else ''}",
            "this is a defect: run again with --debug and report the traceback",
            1,
        )


def _command_path(error: UsageError, arguments: list[str]) -> str:
    """The command that an error is about, as it is typed."""
    if error.ctx is not None:
        return str(error.ctx.command_path)
    command = find_command(arguments)
    return "llm-barber" if command is None else f"llm-barber {command.name}"


def _is_out_of_memory(error: Exception) -> bool:
    """Test whether Python, PyTorch or the system has refused memory."""
    refused = any(words in str(error) for words in REFUSED_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and refused)


def _tell(message: str, hint: str, code: int) -> int:
    """Print an error and its hint in two lines on stderr; returns the exit code."""
    print(f"error: {' '.join(message.splitlines())}\nhint: {hint}", file=sys.stderr)
    return code


def _with_typed_settings(text: str, arguments: list[str]) -> str:
    """Show the settings in a text as the command line takes them."""
    return text.rendered(as_typed(arguments)) if isinstance(text, Message) else text


def _terminated(_signal: int, _frame: Any) -> None:
    """Handle SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt
