"""The check of kernels, as a GPU would run it: equal results pass, others do not, and speeds are shown."""

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.gpu.kernels import DTYPES
from llm_barber.tools.selftest import kernels
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.result import NotRunError


@pytest.fixture
def on_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench that claims to be on a GPU, with small tensors."""
    monkeypatch.setattr(Bench, "on_gpu", True)
    for name, size in (("TOKENS", 3), ("HEADS", 2), ("FEATURES", 4), ("INNER", 5), ("SHAPE", (3, 4))):
        monkeypatch.setattr(kernels, name, size)
    return bench


def test_results_and_speeds_are_found(on_gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "lack", lambda _: None)
    monkeypatch.setattr(kernels, "wrong_steps", lambda _, dtype: ["SwiGLU"] if dtype == torch.float16 else [])
    findings = list(kernels.check_kernels(on_gpu))
    assert [finding.passed for finding in findings] == [True, False, True] + [True] * len(kernels.STEPS)
    assert findings[1].text == "float16: results differ from PyTorch's: SwiGLU, SwiGLU"
    assert "SwiGLU of LLaMA-2 7B: " in findings[len(DTYPES) + 1].text


def test_a_kernel_that_does_not_compile_is_an_error(on_gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[str]:
        raise OSError("no compiler")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "lack", lambda _: None)
    monkeypatch.setattr(kernels, "wrong_steps", fail)
    with pytest.raises(OSError, match="no compiler"):
        next(kernels.check_kernels(on_gpu))


def test_without_triton_there_is_nothing_to_check(on_gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "lack", lambda _: "Triton is not installed")
    with pytest.raises(NotRunError, match="Triton is not installed"):
        next(kernels.check_kernels(on_gpu))
