"""Evaluation texts, joined as the released programs join them, so that numbers compare with published ones."""

from os.path import expanduser
from pathlib import Path

from torch import Tensor

from llm_barber.checkpoint.regular import check_regular
from llm_barber.errors import CalibrationError, HubError
from llm_barber.text.calibration import read_text
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.text.windows import TextTokenizer, windows_of

KNOWN = ("wikitext2", "ptb", "c4")
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


def evaluation_text(name: str) -> str:
    """The whole text of a name or file.

    `wikitext2`: the raw test file, shipped with the package; `ptb` and `c4`: from the hub, the test split and the first
    1,100 documents of the first validation file; else a text, jsonl or parquet file.

    Raises:
        CalibrationError: unknown or unreadable.
        HubError: the hub is needed and cannot be reached.
    """
    match name:
        case "wikitext2":
            # As the data set has it: a row a line, with its line end; rows of blanks are empty; rows joined by "\n\n".
            lines = read_text("builtin-test").splitlines(keepends=True)
            return "\n\n".join(line if line.strip() else "" for line in lines)
        case "ptb":
            return " ".join(_hub_column("sentence", path="ptb-text-only/ptb_text_only", split="test"))
        case "c4":
            files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
            rows = _hub_column("text", C4_DOCUMENTS, path="allenai/c4", data_files=files, split="validation")
            return " ".join(rows)
        case _:
            check_text(name)
            return read_text(name)


def check_text(name: str) -> None:
    """Refuse what is neither a known name nor a file of text, without reading it.

    Raises:
        CalibrationError: it is neither.
    """
    if name.endswith(TOKEN_FILE_SUFFIX):
        raise CalibrationError(f"{name} holds tokens, not text", "give a .txt, .jsonl or .parquet file")
    if name not in KNOWN:
        check_regular(Path(expanduser(name)), CalibrationError)
    if name not in KNOWN and not Path(expanduser(name)).is_file():
        raise CalibrationError(
            f"no such text: {name}", f"known are {', '.join(KNOWN)}, or a .txt, .jsonl or .parquet file"
        )


def evaluation_windows(
    name: str, text: str, tokenizer: TextTokenizer, seqlen: int, windows: int | None = None, bos: bool = True
) -> Tensor:
    """The first windows of a text, int64 (windows, seqlen).

    Args:
        name: of the text; of `c4` it is the first 256 windows at most, as the released programs take them.
        text: the whole of it.
        tokenizer: the model's.
        seqlen: tokens a window.
        windows: how many at most; None: all whole ones.
        bos: let each begin as the tokenizer has texts begin, with a BOS token most often.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    found, tokens = windows_of(text, tokenizer, seqlen, bos)
    if not len(found):
        raise CalibrationError(
            f"text {name!r} has {tokens} tokens, fewer than one window of {seqlen}",
            "use a shorter --seqlen or a longer text",
        )
    return found[:windows][: C4_WINDOWS if name == "c4" else None].clone()  # not a view of all of them


def _hub_column(column: str, rows: int | None = None, **settings: object) -> list[str]:
    from datasets import load_dataset

    try:
        data = load_dataset(**settings)
        return list(data[column][:rows])
    except Exception as error:  # the library raises whatever its parts raise
        raise HubError(
            f"text {settings['path']} could not be loaded from the hub ({type(error).__name__})",
            "check the connection, or use --text wikitext2 or a file of your own",
        ) from error
