"""Norms of a CPU pass; other norms, and gradients that change, do not."""

from itertools import count

import pytest
import torch
from torch import Tensor

from llm_barber.model.fused_norms import FORMS
from llm_barber.tools.selftest.bench import CPU, Bench
from llm_barber.tools.selftest.norms import check_norms, judge_norm

CALLS = count()


def _centred(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if hidden.dtype == torch.float64:  # what is expected
        return FORMS[0](hidden, weight, epsilon)
    return FORMS[0](hidden - hidden.mean(-1, keepdim=True), weight, epsilon)


def _wrong_gradient(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if hidden.dtype == torch.float64:
        return FORMS[0](hidden, weight, epsilon)
    right = FORMS[0](hidden, weight, epsilon)
    return right.detach() + hidden - hidden.detach()


def _changing(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return FORMS[0](hidden, weight, epsilon) * (1 + 2.0**-20 * next(CALLS))


def _not_finite(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return FORMS[0](hidden, weight, epsilon) * torch.nan


def test_norms_of_this_cpu_pass(bench: Bench) -> None:
    findings = list(check_norms(bench))
    assert len(findings) == len(FORMS) * (len(bench.dtypes) + 1)
    assert all(finding.passed for finding in findings), [finding.text for finding in findings]
    assert "weight after, float32: largest error" in findings[0].text


@pytest.mark.parametrize("form", [_centred, _wrong_gradient, _changing, _not_finite])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_norms_do_not(form: object, dtype: torch.dtype) -> None:
    if form is _changing and dtype == torch.bfloat16:
        pytest.skip("too small a change for this dtype")
    finding = judge_norm(CPU, dtype, form)  # type: ignore[arg-type]
    assert not finding.passed
    assert ("other bytes" in finding.text) is (form is _changing or form is _not_finite)
