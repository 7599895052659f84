"""The report of `selftest` as Markdown: readable in a terminal, and to be pasted into an issue."""

from llm_barber.tools.selftest.result import CheckResult, SelftestReport, Status, TimedRun
from llm_barber.tools.selftest.suite import title_of
from llm_barber.usage import readable_bytes

MARKS = {Status.PASSED: "passed", Status.FAILED: "**failed**", Status.NOT_RUN: "not run"}


def to_markdown(report: SelftestReport) -> str:
    """The report as Markdown, with a final newline."""
    lines = [
        f"### llm-barber selftest: {summary(report)}",
        "",
        f"{report.machine}; {report.device}, {report.dtype}; {report.seconds:.0f} s",
        "",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "",
        "| check | result | seconds |",
        "|---|---|---:|",
        *(
            f"| {result.check}: {title_of(result.check)} | {MARKS[result.status]}"
            f"{f' ({_cell(result.reason)})' if result.reason else ''} | {result.seconds:.1f} |"
            for result in report.checks
        ),
    ]
    for result in report.checks:
        lines += _findings(result)
    for run in report.runs:
        lines += _times(run)
    return "\n".join(lines) + "\n"


def summary(report: SelftestReport) -> str:
    """Numbers of checks by outcome, in words.

    Example: "7 passed, 1 failed, 2 not run".
    """
    return ", ".join(f"{len(report.of_status(status))} {status}" for status in Status)


def _findings(result: CheckResult) -> list[str]:
    """Lines of what a check found; failures are marked."""
    if not result.findings:
        return []
    lines = [
        f"- {'' if finding.passed else '**failed** '}{' '.join(finding.text.split())}" for finding in result.findings
    ]
    return ["", f"**{result.check}**", "", *lines]


def _times(run: TimedRun) -> list[str]:
    """Table of a run's stages beside its plan's, with the GPU's memory."""
    rows = [f"| {stage.stage} | {stage.planned:.2f} | {stage.taken:.2f} |" for stage in run.stages]
    lines = ["", f"**{run.run}**", "", "| stage | planned, s | taken, s |", "|---|---:|---:|", *rows]
    if run.planned_memory is not None and run.peak_memory is not None:
        sizes = [readable_bytes(size, 1024) for size in (run.planned_memory, run.peak_memory)]
        lines.append(f"| GPU memory | {sizes[0]} | {sizes[1]} |")
    return lines


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
