"""`generate` as a user meets it: the text on stdout, speed and memory on stderr, two models side by side."""

import io
import json
import re
from pathlib import Path

import pytest

from llm_barber.cli import _main
from llm_barber.cli.progress import ConsoleProgress
from llm_barber.tools.generate import Clock
from tests.conftest import make_model
from tests.helpers.text import add_tokenizer


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model", "llama")
    add_tokenizer(folder)
    return folder


def call(*arguments: object) -> int:
    return _main(["generate", *map(str, arguments)])


def test_the_text_is_on_stdout_and_its_speed_on_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, "Once upon", "--max-new-tokens", 6, "--json", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    record = json.loads(captured.out)
    assert (record["against"], record["decode_ratio"], record["interrupted"]) == (None, None, False)
    text = record["generated"]["text"]
    assert call(model, "Once upon", "--max-new-tokens", 6) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{text}\n"
    assert "warming up" in captured.err
    assert re.search(
        r"^prefill: 9 tokens at [\d,.]+ tokens/s\ndecode: 5 tokens at [\d,.]+ tokens/s\n", captured.err, re.M
    )
    assert re.search(r"^memory: weights [\d.]+ kB; the process grew by [\d.]+ (\wB|bytes)$", captured.err, re.M)
    assert "stopped after 6 tokens: --max-new-tokens lets it write more\n" in captured.err
    assert call(model, "Once upon", "--max-new-tokens", 500) == 0
    assert re.search(r"^stopped after \d\d tokens: the model's context is full$", capsys.readouterr().err, re.M)


def test_two_models_side_by_side(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_model(tmp_path / "other", "llama", seed=1)
    arguments = [model, "Once upon", "--against", other, "--max-new-tokens", 6, "--repeats", 2]
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines()[:-1])) <= 80  # the last line names the processor
    rows = dict(re.findall(r"^│ (\w[\w ,/]+?) +│ (.*) │$", captured.out, re.M))
    assert list(rows) == ["decode, tokens/s", "prefill, tokens/s", "weights", "memory growth"]
    for row in ("decode, tokens/s", "prefill, tokens/s"):
        first, second, ratio = (float(cell.replace(",", "")) for cell in rows[row].split("│"))
        assert ratio == pytest.approx(first / second, rel=0.05)
    assert "speeds: fastest of 2 rounds of 6 tokens, in turn\n" in captured.out
    assert "prompt: 9 tokens\n" in captured.out
    assert call(*arguments, "--json", "--quiet") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["against"]["model"] == str(other)
    assert record["decode_ratio"] > 0
    assert record["generated"]["text"] != record["against"]["text"]


def test_a_prompt_from_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for prompt in ("-", "Once upon"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
        assert call(model, prompt, "--max-new-tokens", 4, "--quiet") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call(model, "-", "--quiet") == 2
    assert capsys.readouterr().err.startswith("error: PROMPT: standard input is empty\nhint: ")


def test_verbose_says_what_is_chosen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, "Once upon", "--max-new-tokens", 2, "--keep-packed", "auto", "-v") == 0
    assert "keep_packed: 0 linears packed, " in capsys.readouterr().err
    assert call(model, "Once upon", "--max-new-tokens", 2, "--keep-packed", "auto") == 0
    assert "keep_packed" not in capsys.readouterr().err


def test_an_interrupt_shows_what_was_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = Clock.put

    def interrupting(clock: Clock, value: object) -> None:
        if len(clock.tokens) == 3:
            raise KeyboardInterrupt
        put(clock, value)  # type: ignore[arg-type]

    monkeypatch.setattr(Clock, "put", interrupting)
    assert call(model, "Once upon", "--max-new-tokens", 9) == 130
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "decode: 2 tokens at " in captured.err
    assert "stopped after" not in captured.err
    assert captured.err.endswith(
        "error: interrupted after 3 of 9 tokens\nhint: text and speed above are those of the tokens that were written\n"
    )


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self) -> bool:
        return True


def test_control_characters_of_a_text_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = Terminal(), io.StringIO()
    with ConsoleProgress(quiet=True) as progress:
        for stream in (terminal, file):
            monkeypatch.setattr("sys.stdout", stream)
            progress.write("a\x1b[2Jb\tc\nä\x9b")
    assert terminal.getvalue() == "a?[2Jb\tc\n??"
    assert file.getvalue() == "a\x1b[2Jb\tc\nä\x9b"
