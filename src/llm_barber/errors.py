"""Exceptions of the program: each has a message, in one line, and a hint that says what the user can do."""


class BarberError(Exception):
    """Any problem that a user can solve; `str(error)` is one line, `exit_code` is the command's.

    Settings are named as the command line writes them: `--samples`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.add_note(f"hint: {hint}")  # Python shows it below a traceback
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["BarberError"], tuple[str, str]]:
        """Let the error travel from one process to another."""
        return type(self), (self.message, self.hint)


def first_line(error: BaseException) -> str:
    """First line of a library's error, with the second line if the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


class SettingsError(BarberError):
    """Settings that are wrong, or do not fit each other or the model."""

    exit_code = 2


class ModelError(BarberError):
    """A checkpoint that is missing, damaged or unsupported, or that holds NaN or Inf."""


class NotFiniteError(ModelError):
    """NaN or Inf, in a checkpoint or computed; the same run would meet them again."""


def overflowed(value: str) -> NotFiniteError:
    """Make the error for a computed value that overflowed, for example "the output of layer 3"."""
    return NotFiniteError(
        f"{value} holds NaN or Inf on the calibration text",
        "compute with a wider range: --dtype bfloat16 or float32; if it was, the model itself overflows",
    )


class CalibrationError(BarberError):
    """Calibration text that is missing, unreadable or too short."""


class HubError(BarberError):
    """The hub cannot be reached, or does not have the requested model or data."""


class OutputError(BarberError):
    """An output that exists, is damaged, or cannot be written."""


class UnfinishedRunError(OutputError):
    """A run that cannot be resumed: it is another run, or its files are damaged."""


class VerificationError(BarberError):
    """A checkpoint that differs from its record or from the dense model."""


class InterruptedTextError(BarberError):
    """A text that the user ended by Ctrl-C, after a part of it was written."""

    exit_code = 130


class TaskError(BarberError):
    """An evaluation task that is unknown, cannot be run, or has a wrong file."""
