"""One tree of exceptions. Each carries what went wrong (one line) and a hint that says what to do about it."""


class BarberError(Exception):
    """Anything that a user can mend; `str(error)` is one line, `hint` says how, `exit_code` is the command's.

    `message` and `hint` may be `Message`s (`messages.py`), whose settings the command line shows as they are typed.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; in two where the first one only announces the second."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


class SettingsError(BarberError):
    """Settings that are wrong by themselves, whatever the files hold."""

    exit_code = 2


class ModelError(BarberError):
    """A checkpoint that is missing, damaged, of an unsupported kind, or holds NaN or Inf."""


class NotFiniteError(ModelError):
    """Values that are NaN or Inf, of a checkpoint or computed: the same run would find them again."""


def overflowed(what: str) -> NotFiniteError:
    """The error of what was computed, for example "the output of layer 3"."""
    return NotFiniteError(
        f"{what} holds NaN or Inf on the calibration text",
        "compute with a wider range: --dtype bfloat16 or float32; if it was, the model itself overflows",
    )


class CalibrationError(BarberError):
    """Calibration text that is missing, unreadable or too short."""


class HubError(BarberError):
    """The hub was needed and could not be reached, or does not have what was asked for."""


class OutputError(BarberError):
    """An output folder that cannot be written."""


class VerificationError(BarberError):
    """A checkpoint that is not what its record, or the dense model, says."""


class TaskError(BarberError):
    """An evaluation task that is unknown or cannot be run, or whose file is wrong."""
