"""The command line as a user meets it: help, exit codes, messages, stdout and stderr."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import cli
from llm_barber.__main__ import main
from llm_barber.settings.base import Settings
from llm_barber.settings.compare import CompareConfig, EvaluateConfig
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.tools import (
    ConvertConfig,
    DemoConfig,
    GenerateConfig,
    InspectConfig,
    PackConfig,
    ReportConfig,
    UnpackConfig,
)  # fmt: skip
from tests.conftest import make_model, save_tokens
from tests.helpers.commands import COMMANDS, call, parameters
from tests.helpers.forked import ForkedProgram

# The settings of each command, and those that the command line does not take.
CONFIGS: dict[str, tuple[type[Settings], set[str]]] = {
    "prune": (PruneConfig, set()), "rebuild": (RebuildConfig, set()), "inspect": (InspectConfig, set()),
    "plan": (PlanConfig, {"output", "bos", "seed", "format", "overwrite", "resume", "report"}),
    "pack": (PackConfig, set()), "unpack": (UnpackConfig, set()), "convert": (ConvertConfig, set()),
    "evaluate": (EvaluateConfig, set()), "generate": (GenerateConfig, set()), "report": (ReportConfig, set()),
    "compare": (CompareConfig, {"rebuild_settings", "task_seeds"}), "demo": (DemoConfig, set()),
}  # fmt: skip
DISPLAY = {"json", "quiet", "verbose", "debug", "dry_run", "keep"}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("command", CONFIGS)
def test_every_setting_is_an_option_that_help_describes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, python_only = CONFIGS[command]
    given = {name: option for name, option in parameters(command).items() if name not in DISPLAY}
    assert given.keys() == config.model_fields.keys() - python_only
    monkeypatch.setenv("COLUMNS", "80")
    assert call(command, "--help") == 0
    shown = capsys.readouterr().out
    assert call(command, "-h") == 0
    assert capsys.readouterr().out == shown
    lines = shown.splitlines()
    assert lines[0].startswith("Usage: ")
    assert len(lines) < 125, "shorten a description"
    assert any(line.startswith(f"llm-barber {command}") for line in lines), "an example"
    words = set(re.split(r"[^\w-]+", shown))
    assert all(config.typed(name) in words for name in given)
    for name, option in given.items():
        default = config.model_fields[name].default
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            assert f"(default: {default}" in option.help


def test_help_has_panels_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", "--help") == 0
    shown = capsys.readouterr().out
    for panel in ("Arguments", "Method", "Quality", "Calibration", "Linears", "Resources", "Output"):
        assert f" {panel} ─" in shown or f" {panel} -" in shown
    assert "magnitude 0.1, sparsegpt 0.1, alps 0.1, else 0.01" in shown
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("prune MODEL OUT --sparsity 1.5", 2, "--sparsity: sparsity 1.5 is not between 0 and 1"),
        ("prune MODEL OUT --samples half", 2, "--samples: 'half' should be a valid integer"),
        ("prune MODEL OUT --initial best", 2, "--initial: 'best' should be 'wanda', 'magnitude', "),
        ("prune MODEL OUT --sparsity 0.5 --pattern 2:4", 2, "--sparsity and --pattern exclude each other"),
        ("prune MODEL OUT --layers=", 2, "--layers: the value is empty"),
        ("prune MODEL OUT --device tpu", 2, "--device: unknown device 'tpu'"),
        ("prune MODEL OUT --what", 2, "No such option"),
        ("prune MODEL", 2, "Missing argument 'OUT'"),
        ("prune MODEL MODEL", 2, "the output folder "),
        ("prune MODEL OUT --include q_proj --exclude q_proj", 2, "--include, --exclude, --skip-layers and "),
        ("prune MODEL OUT --exclude target_mix", 2, "--exclude: no linear's name matches 'target_mix'"),
        ("prune MODEL OUT --skip-layers 7", 2, "--skip-layers: there is no decoder layer 7"),
        ("prune MODEL OUT --layers no.path", 2, "--layers no.path is not the path of a list of decoder layers"),
        ("prune MODEL OUT --memory 1MiB --preset paper", 2, "--memory: 1 MiB is too little"),
        ("prune MODEL OUT --pattern 2:5", 1, "pattern 2:5 does not divide"),
        ("prune MODEL OUT --calibration nothing", 1, "no such calibration text: nothing"),
        ("prune MODEL OUT --calibration builtin --seqlen 8", 1, "the model has no tokenizer"),
        ("inspect /nothing/here", 1, "no such model: /nothing/here"),
        ("compare MODEL OUT --seeds ,", 2, "--seeds: ',' names nothing"),
        ("pack MODEL OUT --values int4", 2, "--values: 'int4' should be 'exact' or 'int8'"),
    ],
)  # fmt: skip
def test_errors_are_two_lines(
    tmp_path: Path,
    llama: Path,
    tokens: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    message: str,
) -> None:
    """Settings are named as the user types them; with --debug a traceback comes first."""
    command = [word.replace("MODEL", str(llama)).replace("OUT", str(tmp_path / "out")) for word in arguments.split()]
    if command[0] == "prune" and "--calibration" not in command:
        command += ["--calibration", str(tokens)]
    assert call(*command, "--quiet") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith(f"error: {message.replace('MODEL', str(llama))}")
    assert hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()
    assert call(*command, "--quiet", "--debug") == code
    debugged = capsys.readouterr().err
    assert debugged.endswith(captured.err)
    assert debugged.startswith("Traceback ") is ("No such option" not in error and "Missing" not in error)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (RuntimeError("this is new"), "unexpected RuntimeError: this is new\nhint: this is a defect"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory\nhint: use fewer --samples"),
        (OSError(5, "no disk"), "[Errno 5] no disk\nhint: check the disk"),
    ],
)
def test_defects_and_the_system_s_errors(
    raised: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr("llm_barber.run.commands.prune", broken)
    assert call("prune", "model", tmp_path / "out", "--quiet") == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


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
    options = ("--calibration", tokens, "--preset", "paper", "--no-report", "--quiet")
    assert call("prune", llama, pruned, *options) == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for command in (["prune", llama], ["rebuild", llama, pruned]):
        assert call(*command, tmp_path / "out", "--calibration", tokens, "--dry-run") == 0
        assert "nothing was written" in capsys.readouterr().out
    assert call("prune", llama, tmp_path / "out", "--calibration", tokens, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 18432
    assert sorted(tmp_path.rglob("*")) == before


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


@pytest.mark.parametrize("count", ["", "1", "2"])
def test_a_failed_process_of_several_ends_at_once(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, int]] = []
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setattr(cli, "_main", lambda _: 2)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.os, "_exit", lambda code: ended.append(("at once", code)))
    monkeypatch.setattr(cli.sys, "exit", lambda code: ended.append(("as usual", code)))
    cli.main()
    assert ended[0] == (("at once", 2) if count == "2" else ("as usual", 2))


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
    while not list(tmp_path.glob("out.partial/*-00004-of-*")):
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    os.kill(process.pid, sent_signal)
    assert process.wait() == code
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/*index.json"))
    if sent_signal != signal.SIGKILL:
        assert process.stderr.splitlines()[-2] == "error: interrupted"
        assert "the same command with --resume goes on" in " ".join(process.stderr.split())
    assert call(*arguments) == 1
    assert "hint: add --resume to go on with it" in capsys.readouterr().err
    if sent_signal != signal.SIGTERM:  # a resumed run takes time, and SIGTERM is handled as SIGINT is
        assert call(*arguments, "--quiet", "--resume") == 0
        assert out.exists()
        assert not list(tmp_path.glob("out.partial"))
