"""Results of `selftest`: what each check found, the times of runs beside their plans, and the card they are of."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from llm_barber.settings.selftest import Check


class NotRunError(Exception):
    """A check cannot run here; its text is the reason."""


class Status(StrEnum):
    """Outcome of a check. A check that could not run has not passed."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


class Finding(BaseModel):
    """A part of a check: what was seen, in words, and whether it is as it should be."""

    model_config = ConfigDict(frozen=True)

    text: str
    passed: bool


class CheckResult(BaseModel):
    """Outcome of a check; `reason`: why it was not run."""

    model_config = ConfigDict(frozen=True)

    check: Check
    status: Status
    findings: tuple[Finding, ...]
    reason: str | None
    seconds: float


class StageTime(BaseModel):
    """Seconds of a run's stage, as planned and as taken."""

    model_config = ConfigDict(frozen=True)

    stage: str
    planned: float
    taken: float


class TimedRun(BaseModel):
    """A run beside its plan, in words and numbers; memory in bytes, of the GPU, None without one."""

    model_config = ConfigDict(frozen=True)

    run: str
    stages: tuple[StageTime, ...]
    planned_memory: float | None
    peak_memory: int | None


class SelftestReport(BaseModel):
    """The report: card and versions, the outcome of every check, and timed runs.

    `device`: as PyTorch names it. `machine`: card or processor in words. `versions`: of driver, libraries and packages.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    machine: str
    dtype: str
    versions: dict[str, str]
    checks: tuple[CheckResult, ...]
    runs: tuple[TimedRun, ...]
    seconds: float

    def of_status(self, status: Status) -> list[Check]:
        """Checks of this outcome."""
        return [result.check for result in self.checks if result.status is status]
