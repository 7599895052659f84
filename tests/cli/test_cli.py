"""The command line as a user meets it: exit codes, messages, stdout and stderr."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber.__main__ import main
from llm_barber.cli import _main
from llm_barber.settings.checked import Settings
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.plan import PlanConfig
from tests.conftest import make_model, save_tokens
from tests.helpers.commands import COMMANDS, CONFIGS, parameters
from tests.helpers.forked import ForkedProgram

ROOT = Path(__file__).parents[2]
# Settings of `prune` that do not change a forecast, and that `plan` does not take.
NOT_IN_PLAN = ("bos", "seed", "format", "overwrite", "resume", "report")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def call(*arguments: object) -> int:
    return _main([str(argument) for argument in arguments])


def test_prune_inspect_rebuild(tmp_path: Path, llama: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("prune", llama, out, "--calibration", tokens, "--pattern", "2:4") == 0
    captured = capsys.readouterr()
    assert "9,216 of 18,432 weights pruned (50.00%)" in captured.out
    assert "reading calibration text" in captured.err
    assert call("inspect", out, "--dense", llama) == 0
    assert "2:4" in capsys.readouterr().out
    assert (
        call("rebuild", llama, out, tmp_path / "again", "--calibration", tokens, "--json", "--rebuild-ratio", "0.5")
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["pattern"] == "2:4"
    assert record["sparsity"] == 0.5


def test_inspect_exits_with_1_if_the_checkpoint_differs(
    tmp_path: Path, llama: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--calibration", tokens, "--preset", "paper", "--rebuild-ratio", "0.5", "--no-report", "--quiet")
    assert call("prune", llama, tmp_path / "out", *arguments) == 0
    assert capsys.readouterr().err == ""
    other = make_model(tmp_path / "other", "llama", seed=5)
    assert call("inspect", tmp_path / "out", "--dense", other, "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"]
    assert "differs from the dense model" in captured.err


def test_dry_run_writes_nothing(tmp_path: Path, llama: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = tmp_path / "pruned"
    arguments = ("--calibration", tokens, "--preset", "paper", "--no-report", "--quiet")
    assert call("prune", llama, pruned, *arguments) == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for command in (["prune", llama], ["rebuild", llama, pruned]):
        assert call(*command, tmp_path / "out", "--calibration", tokens, "--dry-run") == 0
        assert "nothing was written" in capsys.readouterr().out
    assert call("prune", llama, tmp_path / "out", "--calibration", tokens, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 18432
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--sparsity", "1.5"], 2, "sparsity 1.5 is not between 0 and 1"),
        (["--sparsity", "half"], 2, "--sparsity: 'half' is not a number"),
        (["--sparsity", "0.5", "--pattern", "2:4"], 2, "exclude each other"),
        (["--pattern", "4:2"], 2, "pattern 4:2 must keep"),
        (["--initial", "best"], 2, "--initial: 'best' is not one of wanda, magnitude, sparsegpt, ria, dsnot, alps"),
        (["--rebuild-ratio", "0"], 2, "--rebuild-ratio"),
        (["--samples", "0", "--seqlen", "1"], 2, "--samples: 0 is too small: the least is 1"),
        (["--device", "tpu"], 2, "unknown device 'tpu'"),
        (["--what"], 2, "No such option"),
        (["--pattern", "2:5"], 1, "does not divide"),
        (["--calibration", "nothing", "--seqlen", "8"], 1, "no such calibration text: nothing"),
        (["--calibration", "builtin", "--seqlen", "8"], 1, "no tokenizer"),
    ],
)
def test_errors_are_two_lines(
    tmp_path: Path,
    llama: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert call("prune", llama, tmp_path / "out", "--calibration", tokens, "--quiet", *options) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_missing_argument_and_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", "model") == 2
    assert "Missing argument 'OUT'" in capsys.readouterr().err
    assert call("inspect", "/nothing/here", "--quiet") == 1
    assert capsys.readouterr().err.startswith("error: no such model: /nothing/here\nhint: ")


@pytest.mark.parametrize("command", ["prune", "rebuild", "plan", "inspect", "evaluate", "generate", "demo"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    output = capsys.readouterr().out
    assert call(command, "-h") == 0
    assert capsys.readouterr().out == output
    assert "Examples:" in output
    assert output.partition("Examples:")[2].count("llm-barber ") >= 2
    if command in ("prune", "rebuild", "plan"):
        for group in ("Method", "Quality", "Calibration", "Resources", "Output"):
            assert f"─ {group} ─" in output or f"{group} -" in output
        assert "magnitude 0.1, sparsegpt 0.1, alps 0.1, else 0.01" in output


@pytest.mark.parametrize("count", ["", "1", "2"])
def test_a_failed_process_of_several_ends_at_once(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_barber import cli

    ended: list[tuple[str, int]] = []
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setattr(cli, "_main", lambda _: 2)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.os, "_exit", lambda code: ended.append(("at once", code)))
    monkeypatch.setattr(cli.sys, "exit", lambda code: ended.append(("as usual", code)))
    cli.main()
    assert ended[0] == (("at once", 2) if count == "2" else ("as usual", 2))


@pytest.mark.parametrize(("command", "lines"), [*((name, 120) for name in COMMANDS), ("prune", 110)])
def test_help_is_short_and_has_an_example(
    command: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(command, "--help") == 0
    usage, _, sentence, *others = capsys.readouterr().out.splitlines()
    assert usage.startswith("Usage: ")
    assert sentence[0].isupper()
    assert any(line.startswith(f"llm-barber {command}") for line in others)
    assert len(others) < lines, "shorten a description"


def test_every_setting_is_an_option() -> None:
    """Conversely, every option is a setting, but for those of the display; numbers have the same defaults."""
    python_only: dict[type[Settings], set[str]] = {
        PlanConfig: {"output", *NOT_IN_PLAN},
        CompareConfig: {"rebuild_settings", "task_seeds"},
    }
    only_of_pack = {"unpack": {"values"}}  # the two commands share their settings
    display = {"json", "quiet", "verbose", "debug", "dry_run", "keep"}
    assert CONFIGS.keys() == COMMANDS.keys()
    for command, config in CONFIGS.items():
        options = parameters(command)
        expected = config.model_fields.keys() - python_only.get(config, set()) - only_of_pack.get(command, set())
        assert options.keys() - display == expected, command
        for name, field in config.model_fields.items():
            if name in options and isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert options[name].default == field.default, (command, name)


def test_help_names_settings_as_they_are_typed() -> None:
    """Fields' descriptions have settings in backticks; help texts have the options instead."""
    texts = {name: {key: option.help for key, option in parameters(name).items()} for name in COMMANDS}
    assert texts["prune"]["overwrite"] == "Replace OUT when the new model is complete"
    assert texts["pack"]["overwrite"] == "Replace PACKED when the new copy is complete"
    assert "--refine swaps" in texts["prune"]["swaps"]
    assert not any("`" in text for options in texts.values() for text in options.values())


def test_documented_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands in the README and the docs use existing options only."""
    import re

    commands = 0
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for line in path.read_text().splitlines():
            match = re.match(r"\s*(?:\$ )?llm-barber ([a-z]+)\b(.*)", line)
            if match and match[1] in COMMANDS:
                call(match[1], "--help")
                help_text = capsys.readouterr().out
                commands += 1
                for option in re.findall(r"--[a-z-]+", match[2].partition(" # ")[0]):
                    assert option in help_text, (path, option)
    assert commands >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--no-rebuild", "--rebuild-ratio", 1, "--granularity", "block"),
            "--granularity and --rebuild-ratio need the rebuild: leave out --no-rebuild",
        ),
        (("--swaps", 3), "--swaps needs --refine swaps"),
        (("--refine", "swaps", "--swaps", 10**20), "--swaps: 100000000000000000000 is too large: the most is 1000000"),
        (("--tune-passes", 10**20), "--tune-passes: 100000000000000000000 is too large: the most is 1000"),
        (("--guard", 1), "--guard: 1 is too large: it must be below 1"),
        (("--target-mix", "nan"), "--target-mix: 'nan' is not a finite number"),
    ],
)
def test_errors_name_options_as_they_are_typed(
    tmp_path: Path, llama: Path, options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("prune", llama, tmp_path / "out", *options) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_error_of_a_damaged_checkpoint_does_not_advise_resuming(
    tmp_path: Path, llama: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    assert call("prune", llama, tmp_path / "out", "--calibration", tokens, "--preset", "paper") == 1
    shown = capsys.readouterr().err
    assert "holds NaN or Inf" in shown
    assert "--resume" not in shown


@pytest.mark.parametrize(("sent_signal", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_can_be_resumed_and_does_not_look_complete(
    tmp_path: Path, sent_signal: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "dense", "llama", num_hidden_layers=12)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=64, tokens=64)
    out = tmp_path / "out"
    # The preset does not read the whole model before the first layer, as the allocation by loss would.
    arguments = ["prune", model, out, "--calibration", tokens, "--preset", "paper", "--no-report"]

    def program() -> None:
        sys.argv = ["llm-barber", *map(str, arguments)]
        main()

    process = ForkedProgram(program, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*-00004-of-*")):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, sent_signal)
    assert process.wait() == code
    stdout, stderr = process.stdout, process.stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/*index.json"))
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out.partial")
    if sent_signal != signal.SIGKILL:
        assert stderr.splitlines()[-2] == "error: interrupted"
        assert "the same command with --resume goes on" in " ".join(stderr.split())
    assert call(*arguments) == 1
    assert "hint: add --resume to go on with it" in capsys.readouterr().err
    if sent_signal != signal.SIGTERM:  # a resumed run takes time, and SIGTERM is handled as SIGINT is
        assert call(*arguments, "--quiet", "--resume") == 0
        assert out.exists()
        assert not list(tmp_path.glob("out.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "m", "out", "--layers", ""], "--layers is empty"),
        (["prune", "m", "out", "--layers="], "--layers is empty"),
        (["prune", "m", ""], "OUT is empty"),
        (["prune", "m", "--overwrite", ""], "OUT is empty"),
        (["prune", "--samples", "4", "", "out"], "MODEL is empty"),
        (["pack", "m", "--quiet", ""], "PACKED is empty"),
        (["rebuild", "d", "", "out"], "PRUNED is empty"),
        (["generate", "m", " "], "PROMPT is empty"),
        (["generate", "m", "a prompt", "--against="], "--against is empty"),
        (["evaluate", "m", "--tasks-folder", ""], "--tasks-folder is empty"),
        (["compare", "m", "out", "--tasks", " "], "--tasks is empty"),
    ],
)
def test_empty_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}\nhint: give it a value")
