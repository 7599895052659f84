"""The command line: parse → config → call → render. Data goes to stdout, progress and errors to stderr."""

import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from llm_barber.cli.app import app
from llm_barber.cli.typed import as_typed, empty_argument
from llm_barber.errors import BarberError, SettingsError
from llm_barber.messages import Message

# The options' own errors; typer brings its own copy of click from some version on, so that it is not imported by name.
UsageError: Any = typer.BadParameter.__mro__[1]
INTERRUPTED = 130
REFUSED_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")  # who says so
INTERRUPTED_HINT = "nothing half-written was left; start again when you like, with --resume where something was kept"
OUT_OF_MEMORY_HINT = "use fewer --samples, a shorter --seqlen, a smaller --batch-size, or a limit: prune --memory 8GiB"

# In the order of --help.
for commands in ("pruning_commands", "planning_commands", "checkpoint_commands", "measuring_commands"):
    import_module(f"llm_barber.cli.{commands}")


def main() -> None:
    """Run the command line; ends the process with the exit code of what happened."""
    given = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--quiet" in given:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGTERM, _terminated)
    code = _main(given)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # what is left of a group of processes may wait for the others for ever
    sys.exit(code)


def _main(given: list[str]) -> int:
    """Run a command; with --debug the traceback of an error comes before what is said of it in any case."""
    debug = "--debug" in given
    try:
        if empty := empty_argument(given):
            raise SettingsError(f"{empty} is empty", "give it a value; is a variable of the shell not set?")
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BarberError as error:
        if debug:
            traceback.print_exc()
        message, hint = (_shown(text, given) for text in (error.message, error.hint))
        return _tell(message, hint, error.exit_code)
    except UsageError as error:
        if not error.format_message():  # no arguments at all: the help was shown
            return 2
        path = error.ctx.command_path if error.ctx else "llm-barber"
        return _tell(error.format_message(), f"see {path} --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _tell("interrupted", INTERRUPTED_HINT, INTERRUPTED)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _of_memory(error):
            return _tell("out of memory", OUT_OF_MEMORY_HINT, 1)
        if isinstance(error, OSError):
            return _tell(str(error), "check the disk and the permissions", 1)
        lines = str(error).strip().splitlines()
        return _tell(
            f"unexpected {type(error).__name__}: {lines[0] if lines else ''}",
            "this is a defect: run again with --debug and report the traceback",
            1,
        )


def _of_memory(error: Exception) -> bool:
    """Has the system refused memory, whoever says so?"""
    said = any(words in str(error) for words in REFUSED_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and said)


def _tell(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.splitlines())}\nhint: {hint}", file=sys.stderr)
    return code


def _shown(text: str, given: list[str]) -> str:
    """A text with the settings that it names as they are typed."""
    return text.rendered(as_typed(given)) if isinstance(text, Message) else text


def _terminated(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt
