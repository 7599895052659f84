"""The checks of `llm-barber selftest` on a GPU, where there is one: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.progress import Silent
from llm_barber.settings.selftest import Check, SelftestConfig
from llm_barber.tools.selftest.bench import SMALL, Bench
from llm_barber.tools.selftest.result import CheckResult, Status
from llm_barber.tools.selftest.suite import CHECKS, run_checks, selftest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


def verdict(result: CheckResult) -> None:
    """Skip a check that could not run, and fail with what was found."""
    if result.status is Status.NOT_RUN:
        pytest.skip(f"{result.check}: {result.reason}")
    assert result.status is Status.PASSED, "\n".join(finding.text for finding in result.findings if not finding.passed)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes(tmp_path: Path, check: Check) -> None:
    device = resolve_device("cuda")
    (result,) = run_checks(Bench(device, resolve_dtype("auto", device), tmp_path, SMALL), [check], Silent())
    verdict(result)


def test_runs_are_timed_beside_their_plans() -> None:
    report = selftest(SelftestConfig(device="cuda", checks=(Check.TIMES,)))
    verdict(report.checks[0])
    assert report.runs
