"""The suite on a CPU: outcomes, errors inside checks, progress, the report, and the exit codes of the command."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm_barber.cli import _main
from llm_barber.errors import ModelError, SettingsError
from llm_barber.progress import Silent
from llm_barber.settings.selftest import Check, SelftestConfig
from llm_barber.tools.selftest import suite as suite_module
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.card import driver_version
from llm_barber.tools.selftest.markdown import to_markdown
from llm_barber.tools.selftest.result import Finding, NotRunError, SelftestReport, Status, TimedRun
from llm_barber.tools.selftest.suite import CHECKS, run_check, run_checks, selftest

NEEDS_A_GPU = {
    Check.MASKS, Check.SECOND_GPU, Check.MEMORY, Check.WAITS, Check.SEMI_STRUCTURED, Check.GRAPHS,
    Check.KERNELS,
}  # fmt: skip


class Steps(Silent):
    """Counts steps."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, title: str, total: int, finished: int = 0) -> None:
        self.total = total

    def advance(self, detail: str) -> None:
        self.done += 1


def test_a_cpu_runs_what_it_can_and_says_why_the_rest_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    report = selftest(SelftestConfig(device="cpu"))
    assert [result.check for result in report.checks] == list(Check)
    for result in report.checks:
        if result.check in NEEDS_A_GPU:
            assert (result.status, result.findings) == (Status.NOT_RUN, ())
            assert result.reason
        else:
            assert result.status is Status.PASSED, result
            assert result.findings
    assert set(report.of_status(Status.PASSED)) == set(Check) - NEEDS_A_GPU
    assert {run.run.split(",")[0] for run in report.runs} == {"paper", "mask"}
    assert not list(tmp_path.iterdir())


def test_steps_of_the_progress_are_as_many_as_were_announced(bench: Bench) -> None:
    steps = Steps()
    results = run_checks(bench, list(CHECKS), steps)
    assert steps.done == steps.total
    for result in results:
        if result.status is Status.PASSED:
            assert len(result.findings) == CHECKS[result.check].findings(bench), result.check


def of(*findings: Finding, error: Exception | None = None) -> Iterator[Finding]:
    yield from findings
    if error is not None:
        raise error


GOOD, BAD = Finding(text="good", passed=True), Finding(text="bad", passed=False)


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        (of(GOOD, GOOD), Status.PASSED),
        (of(GOOD, BAD), Status.FAILED),
        (of(), Status.FAILED),  # nothing was checked
        (of(GOOD, error=RuntimeError("broke")), Status.FAILED),
        (of(error=NotRunError("no card")), Status.NOT_RUN),
        (of(GOOD, error=NotRunError("no second card")), Status.NOT_RUN),  # a part alone has not passed
        (of(BAD, error=NotRunError("no second card")), Status.FAILED),
    ],
)
def test_outcomes(findings: Iterator[Finding], status: Status) -> None:
    result = run_check(Check.MASKS, findings)
    assert result.status is status
    if status is Status.NOT_RUN:
        assert result.reason in ("no card", "no second card")


def test_errors_say_where_they_are_from_and_show_no_folder(tmp_path: Path, bench: Bench) -> None:
    def broken() -> Iterator[Finding]:
        yield GOOD
        bench.prune(bench.device, preset="paper", calibration=tmp_path / "nothing.txt", seqlen=8)

    result = run_check(Check.REPEAT, broken())
    assert result.status is Status.FAILED
    assert result.findings[0] == GOOD
    text = result.findings[1].text
    assert text.startswith("CalibrationError: ")
    assert text.endswith(")")
    assert "(text/calibration.py:" in text
    assert "/tools/" not in text


def test_unknown_devices_and_models_are_refused_before_any_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "run_checks", lambda *_: pytest.fail("a check was run"))
    with pytest.raises(SettingsError, match="unknown device"):
        selftest(SelftestConfig(device="tpu"))
    with pytest.raises(ModelError, match="no such model"):
        selftest(SelftestConfig(device="cpu", model="/nothing/here"))
    with pytest.raises(SettingsError, match="'everything' is not one of masks, repeat"):
        SelftestConfig(checks="everything")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="PyTorch sees no GPU"):
            selftest(SelftestConfig(device="cuda"))


def make_report() -> SelftestReport:
    results = [
        run_check(Check.MASKS, of(GOOD)),
        run_check(Check.PACKED, of(Finding(text="two\nlines | of text", passed=False))),
        run_check(Check.SECOND_GPU, of(error=NotRunError("PyTorch sees 1 GPU"))),
    ]
    stages = [{"stage": "layers", "planned": 1.5, "taken": 2.25}]
    run = TimedRun.model_validate(
        {"run": "paper, wanda", "stages": stages, "planned_memory": 2**30, "peak_memory": 2**29}
    )
    return SelftestReport(
        device="cuda:0", machine="A card", dtype="bfloat16", versions={"torch": "2.13", "driver": "1.2"},
        checks=tuple(results), runs=(run,), seconds=12.3,
    )  # fmt: skip


def test_the_report_can_be_pasted() -> None:
    text = to_markdown(make_report())
    lines = text.splitlines()
    assert lines[0] == "### llm-barber selftest: 1 passed, 1 failed, 1 not run"
    assert "A card; cuda:0, bfloat16; 12 s" in lines
    assert "torch 2.13, driver 1.2" in lines
    assert any(line.startswith("| masks: ") and "| passed |" in line for line in lines)
    assert any(line.startswith("| packed: ") and "| **failed** |" in line for line in lines)
    assert any("| not run (PyTorch sees 1 GPU) |" in line for line in lines)
    assert "- **failed** two lines | of text" in lines
    assert "- good" in lines
    assert "| layers | 1.50 | 2.25 |" in lines
    assert "| GPU memory | 1 GiB | 512 MiB |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in tables)


@pytest.mark.parametrize(
    ("statuses", "code", "message"),
    [
        ({Check.PACKED: of(GOOD)}, 0, ""),
        ({Check.PACKED: of(GOOD), Check.MASKS: of(BAD)}, 1, "error: masks: 1 passed, 1 failed, 0 not run"),
        ({Check.MASKS: of(error=NotRunError("no card"))}, 1, "error: no check could run"),
    ],
)
def test_exit_codes(
    statuses: dict[Check, Iterator[Finding]],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = make_report().model_copy(
        update={"checks": tuple(run_check(check, findings) for check, findings in statuses.items())}
    )
    monkeypatch.setattr(suite_module, "selftest", lambda *_: report)
    assert _main(["selftest", "--device", "cpu", "--json", "--quiet"]) == code
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["checks"]) == len(statuses)
    assert shown.err.startswith(message)
    assert len(shown.err.splitlines()) == (2 if code else 0)


def test_the_driver_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert driver_version(path) is None
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (build@host)",
    ):
        path.write_text(line)
        assert driver_version(path) == "550.54.15"
    path.write_text("no number")
    assert driver_version(path) is None
