"""Evaluation texts, joined as the released programs join them: numbers compare with published numbers."""

from os.path import expanduser
from pathlib import Path

from torch import Tensor

from llm_barber.checkpoint.untrusted import check_regular
from llm_barber.errors import CalibrationError, HubError
from llm_barber.text.calibration import read_text
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.text.windows import TextTokenizer, windows_of

KNOWN_TEXTS = ("wikitext2", "ptb", "c4")
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


def evaluation_text(name: str) -> str:
    """The whole text of a known name or of a file.

    `wikitext2`: the raw test file, shipped with the package; `ptb` and `c4`: from the hub, the test split and the first
    1,100 documents of the first validation file; else a text, jsonl or parquet file.

    Raises:
        CalibrationError: the text is unknown or cannot be read.
        HubError: the hub is needed and cannot be reached.
    """
    match name:
        case "wikitext2":
            # The data set has a row for each line, with its line end; rows of blanks are empty; "\n\n" joins the rows.
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
    """Refuse a name that is neither a known text nor a file of text; nothing is read.

    Raises:
        CalibrationError: it is neither.
    """
    if name.endswith(TOKEN_FILE_SUFFIX):
        raise CalibrationError(f"{name} holds tokens, not text", "give a .txt, .jsonl or .parquet file")
    if name in KNOWN_TEXTS:
        return
    path = Path(expanduser(name))
    check_regular(path, CalibrationError)
    if not path.is_file():
        raise CalibrationError(
            f"no such text: {name}", f"known are {', '.join(KNOWN_TEXTS)}, or a .txt, .jsonl or .parquet file"
        )


def evaluation_windows(
    name: str, text: str, tokenizer: TextTokenizer, seqlen: int, windows: int | None = None, bos: bool = True
) -> Tensor:
    """The first windows of a text, token ids, int64, (windows, seqlen).

    Args:
        name: of the text; `c4` gives 256 windows at most, as in the released programs.
        text: the whole text.
        tokenizer: the model's.
        seqlen: tokens of a window.
        windows: the most windows to take; None: all whole ones.
        bos: begin each window as the tokenizer begins a text, usually with a BOS token.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    whole_windows, tokens = windows_of(text, tokenizer, seqlen, bos)
    if not len(whole_windows):
        raise CalibrationError(
            f"text {name!r} has {tokens} tokens, fewer than one window of {seqlen}",
            "use a shorter --seqlen or a longer text",
        )
    limit = C4_WINDOWS if name == "c4" else None
    return whole_windows[:windows][:limit].clone()  # a view would keep all windows in memory


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
