"""The suite of `selftest`: each check in turn, its outcome, and the report."""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import first_line
from llm_barber.gpu.kernels import DTYPES
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.model.fused_norms import FORMS
from llm_barber.progress import Progress, Silent
from llm_barber.settings.selftest import Check, SelftestConfig
from llm_barber.tools.selftest.bench import SMALL, TINY, Bench
from llm_barber.tools.selftest.card import all_versions, describe_machine
from llm_barber.tools.selftest.graphs import check_graphs
from llm_barber.tools.selftest.kernels import STEPS, check_kernels
from llm_barber.tools.selftest.masks import MASK_CHECKS, check_masks
from llm_barber.tools.selftest.norms import check_norms
from llm_barber.tools.selftest.products import HEADS, check_attention, check_packed, check_semi_structured
from llm_barber.tools.selftest.result import CheckResult, Finding, NotRunError, SelftestReport, Status, TimedRun
from llm_barber.tools.selftest.runs import REPEATED, check_memory, check_repeat
from llm_barber.tools.selftest.second_gpu import ON_BOTH, check_second_gpu
from llm_barber.tools.selftest.times import time_runs
from llm_barber.tools.selftest.waits import check_waits

PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class CheckEntry:
    """A check: its function, its title in the report, and about how many findings it has, for the ETA."""

    title: str
    function: Callable[[Bench], Iterator[Finding]]
    findings: Callable[[Bench], int]


CHECKS: dict[Check, CheckEntry] = {
    Check.MASKS: CheckEntry(
        "masks of the GPU are the CPU's, but for rounding",
        check_masks,
        lambda bench: len(MASK_CHECKS) * len(bench.dtypes),
    ),
    Check.REPEAT: CheckEntry("the same run gives the same bytes", check_repeat, lambda _: len(REPEATED)),
    Check.SECOND_GPU: CheckEntry("another GPU gives the same masks", check_second_gpu, lambda _: len(ON_BOTH) + 1),
    Check.MEMORY: CheckEntry("a run goes on when the GPU's memory runs out", check_memory, lambda _: 2),
    Check.WAITS: CheckEntry("a step of tuning hardly waits for the GPU", check_waits, lambda _: 2),
    Check.ATTENTION: CheckEntry(
        "attention is the same with and without a gradient",
        check_attention,
        lambda bench: len(HEADS) * len(bench.dtypes),
    ),
    Check.NORMS: CheckEntry(
        "norms are right, and their gradients the same each time",
        check_norms,
        lambda bench: len(FORMS) * (len(bench.dtypes) + 1),
    ),
    Check.KERNELS: CheckEntry(
        "rotary embeddings, gates and sums of gradients are PyTorch's, in one kernel each",
        check_kernels,
        lambda _: len(DTYPES) + len(STEPS),
    ),
    Check.PACKED: CheckEntry(
        "products with packed weights are right",
        check_packed,
        lambda bench: 2 * (len(bench.dtypes) + 1) + bench.on_gpu,
    ),
    Check.SEMI_STRUCTURED: CheckEntry("2:4 linears convert and multiply right", check_semi_structured, lambda _: 2),
    Check.GRAPHS: CheckEntry("packed decoding waits for nothing, and a CUDA graph takes it", check_graphs, lambda _: 4),
}
TIMES_TITLE = "the time of each stage beside the plan's"


def selftest(config: SelftestConfig, progress: Progress | None = None) -> SelftestReport:
    """Run the checks that the settings name, on the device that they name.

    An error inside a check is a finding of the check; the other checks run.

    Args:
        config: the settings.
        progress: told of each finding.

    Raises:
        SettingsError: there is no such device.
        ModelError, HubError: the model whose runs are to be timed is not there.
    """
    progress = progress or Silent()
    began = time.perf_counter()
    device = resolve_device(config.device)
    if config.model is not None and Check.TIMES in config.checks:
        CheckpointSource(config.model)
    runs: list[TimedRun] = []
    with tempfile.TemporaryDirectory(prefix="llm-barber-selftest-") as folder:
        size = SMALL if device.type == "cuda" else TINY
        bench = Bench(device, resolve_dtype("auto", device), Path(folder), size)
        checks = run_checks(bench, [check for check in CHECKS if check in config.checks], progress)
        if Check.TIMES in config.checks:
            checks.append(_run_times(bench, config.model, progress, runs))
    return SelftestReport(
        device=str(device),
        machine=describe_machine(device),
        dtype=bench.dtype_name,
        versions=all_versions(),
        checks=tuple(checks),
        runs=tuple(runs),
        seconds=time.perf_counter() - began,
    )


def run_checks(bench: Bench, checks: Sequence[Check], progress: Progress) -> list[CheckResult]:
    """Run checks one after the other."""
    counts = {check: CHECKS[check].findings(bench) for check in checks}
    results: list[CheckResult] = []
    if checks:
        progress.start("checking", sum(counts.values()))
    for check in checks:
        steps = _Steps(progress, counts[check])
        results.append(run_check(check, CHECKS[check].function(bench), steps.note))
        steps.finish(f"{check}: {results[-1].status}")
    return results


class _Steps:
    """Steps of the progress that belong to a check: a finding is a step, and the check's end makes up for the rest."""

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress, self._left = progress, count

    def note(self, finding: Finding) -> None:
        """Finish a step, unless the check has more findings than steps."""
        if self._left:
            self._left -= 1
            self._progress.advance(finding.text)

    def finish(self, text: str) -> None:
        """Finish the steps that are left."""
        for _ in range(self._left):
            self._progress.advance(text)


def run_check(
    check: Check, findings: Iterator[Finding], on_finding: Callable[[Finding], None] = lambda _: None
) -> CheckResult:
    """Gather a check's findings; an error is a finding, and without any finding nothing was checked, which fails."""
    began = time.perf_counter()
    seen: list[Finding] = []
    reason: str | None = None
    try:
        for finding in findings:
            seen.append(finding)
            on_finding(finding)
        if not seen:
            seen.append(Finding(text="nothing was checked", passed=False))
    except NotRunError as error:
        reason = str(error)
    except Exception as error:
        seen.append(Finding(text=describe_error(error), passed=False))
    status = Status.PASSED if all(finding.passed for finding in seen) else Status.FAILED
    if reason is not None and status is Status.PASSED:
        status = Status.NOT_RUN
    seconds = time.perf_counter() - began
    return CheckResult(check=check, status=status, findings=tuple(seen), reason=reason, seconds=seconds)


def describe_error(error: Exception) -> str:
    """An error's kind and first line, and the line of this package that it came from, without folders of the user's."""
    frames = [
        f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return f"{type(error).__name__}: {first_line(error)}{f' ({frames[-1]})' if frames else ''}"


def _run_times(bench: Bench, model: str | None, progress: Progress, runs: list[TimedRun]) -> CheckResult:
    """Time the runs; their times go to `runs`."""

    def findings() -> Iterator[Finding]:
        for finding, run in time_runs(bench, model, progress):
            runs.append(run)
            yield finding

    return run_check(Check.TIMES, findings())


def title_of(check: Check) -> str:
    """Title of a check in the report."""
    return TIMES_TITLE if check is Check.TIMES else CHECKS[check].title
