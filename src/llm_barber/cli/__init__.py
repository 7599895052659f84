"""The command line: parse → config → call → render. Data goes to stdout, progress and errors to stderr."""

import os
import re
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from llm_barber.cli.app import app
from llm_barber.cli.options import OPTIONS
from llm_barber.errors import BarberError, SettingsError
from llm_barber.presets import Allocation, Preset, Reconstruct, Refine

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
    code = 1
    try:
        code = _main(given)
    except Exception:  # which is asked for, by --debug
        traceback.print_exc()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # what is left of a group of processes may wait for the others for ever
    sys.exit(code)


def _main(given: list[str]) -> int:
    debug = "--debug" in given
    try:
        _refuse_empty(given)
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BarberError as error:
        if debug:
            raise
        message = _with_options(str(error)) if isinstance(error, SettingsError) else str(error)
        return _tell(message, error.hint, error.exit_code)
    except UsageError as error:
        if not error.format_message():  # no arguments at all: the help was shown
            return 2
        path = error.ctx.command_path if error.ctx else "llm-barber"
        return _tell(error.format_message().replace("Value error, ", ""), f"see {path} --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _tell("interrupted", INTERRUPTED_HINT, INTERRUPTED)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            raise
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


def _refuse_empty(given: list[str]) -> None:
    """Raise `SettingsError` where an argument is empty, which a path would take for the current folder."""
    for before, argument in zip(["", *given], given, strict=False):
        name, equals, value = argument.partition("=")
        if equals and not value and name.startswith("--"):
            before, argument = name, value
        if not argument.strip():
            named = before if before.startswith("--") else "an argument"
            raise SettingsError(
                f"{named} is empty", "leave it out, or give it a value; is a variable of the shell not set?"
            )


def _of_memory(error: Exception) -> bool:
    """Has the system refused memory, whoever says so?"""
    said = any(words in str(error) for words in REFUSED_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and said)


def _tell(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}\nhint: {hint}", file=sys.stderr)
    return code


def _with_options(message: str) -> str:
    """A message with settings as they are typed here: `--rebuild-ratio`, `--refine tune`, `--guard: …`."""
    of_several_words = "|".join(name for name in OPTIONS if "_" in name)
    kinds = {"refine": Refine, "reconstruct": Reconstruct, "allocation": Allocation, "preset": Preset}
    with_a_value = "|".join(f"{name} (?:{'|'.join(kind)})" for name, kind in kinds.items())
    at_the_start = rf"(?:^|(?<=; ))(?:{'|'.join(OPTIONS)})(?=:| is | are | and )"
    found = rf"{at_the_start}|\b(?:{of_several_words}|{with_a_value})\b"
    return re.sub(found, lambda name: f"--{name[0].replace('_', '-')}", message)


def _terminated(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt
