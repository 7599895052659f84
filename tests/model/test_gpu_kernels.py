"""A run computes with the same CUDA kernels from its first product to its last; PyTorch's settings come back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_barber import EvaluateConfig, PruneConfig, evaluate, prune
from llm_barber.model.fixed_order import in_fixed_order
from llm_barber.model.gpu_kernels import REDUCTIONS, same_kernels
from tests.conftest import make_model, save_tokens
from tests.helpers.text import add_tokenizer

SAME = (False, False, False)


def settings() -> tuple[bool, ...]:
    matmul: Any = torch.backends.cuda.matmul
    return torch.backends.cuda.cudnn_sdp_enabled(), *(getattr(matmul, name) for name in REDUCTIONS)


def test_settings_come_back_whatever_happens() -> None:
    matmul: Any = torch.backends.cuda.matmul
    assert settings() == (True, True, True)
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with pytest.raises(KeyError), same_kernels():
            assert settings() == SAME
            assert matmul.fp32_precision == "ieee"
            raise KeyError
        assert settings() == (True, True, True)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k"),
    reason="PyTorch 2.9 has no flag for split sums",
)
def test_the_flag_for_split_sums_comes_back() -> None:
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            with same_kernels():
                assert settings() == SAME
            assert settings() == (False, False, True)
        assert not matmul.allow_bf16_reduced_precision_reduction_split_k
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("warn_only", [False, True])
def test_a_program_s_deterministic_mode_is_off_meanwhile(warn_only: bool) -> None:
    """It refuses `torch.median` on CUDA in some versions, whose values are deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with same_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
            with in_fixed_order():
                assert torch.are_deterministic_algorithms_enabled()
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_versions_of_pytorch_without_a_flag_for_split_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {**dict.fromkeys(REDUCTIONS, True), "fp32_precision": "tf32"}
    matmul = SimpleNamespace(**before)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with same_kernels():
        assert settings() == SAME
        assert matmul.fp32_precision == "ieee"
    assert vars(matmul) == before


def test_attention_of_a_run_and_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(tmp_path / "model", "llama"), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **named: Any) -> torch.Tensor:
        seen.append(settings())
        return attention(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, preset="mask", report=False))
    assert len(seen) > 10
    (tmp_path / "text.txt").write_text("ab cd " * 200)
    add_tokenizer(model)
    evaluate(EvaluateConfig(model=str(model), text=[str(tmp_path / "text.txt")], windows=2, seqlen=16))
    assert set(seen) == {SAME}
    assert settings() == (True, True, True)
