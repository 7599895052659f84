"""Comparison of masks: brute force, and what is judged a fault."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber.method.few_tokens import FEW_TOKENS
from llm_barber.settings.initial import Initial
from llm_barber.tools.selftest.bench import CPU, SMALL, TINY, Bench, Size, compare_masks
from llm_barber.tools.selftest.masks import MASK_CHECKS, check_masks, judge_masks
from llm_barber.tools.selftest.result import NotRunError
from llm_barber.tools.selftest.second_gpu import check_second_gpu


def with_flipped_bits(folder: Path, copy: Path, count: int) -> Path:
    """A copy of a pruned checkpoint with `count` other mask bits, a few in each of two linears."""
    shutil.copytree(folder, copy)
    path = next(copy.glob("model*.safetensors"))
    tensors = load_file(path)
    names = [name for name in sorted(tensors) if name.endswith("mlp.up_proj.weight")]
    for number in range(count):
        weight = tensors[names[number % len(names)]].view(-1)
        place = 7 * number
        weight[place] = 1.0 if weight[place] == 0 else 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def test_every_method_has_bounds() -> None:
    assert set(MASK_CHECKS) >= set(Initial)


@pytest.mark.parametrize("size", [SMALL, TINY])
@torch.no_grad()
def test_some_experts_that_are_tuned_have_windows_without_tokens(tmp_path: Path, size: Size) -> None:
    bench = Bench(CPU, torch.float32, tmp_path, size)
    model = AutoModelForCausalLM.from_pretrained(bench.model("mixtral"))
    ids = load_file(bench.windows("mixtral"))["input_ids"]
    routed = model(ids, output_router_logits=True).router_logits[0].topk(model.config.num_experts_per_tok).indices
    experts = torch.arange(model.config.num_local_experts)
    tokens = (routed.view(len(ids), -1, 1) == experts).sum(1)  # (windows, experts)
    assert ((tokens.sum(0) >= FEW_TOKENS) & (tokens == 0).any(0)).sum() >= 3


@pytest.mark.parametrize("count", [0, 1, 6])
def test_counts_every_bit_that_differs(tmp_path: Path, bench: Bench, count: int) -> None:
    folder, _, _ = bench.prune(CPU, **MASK_CHECKS["wanda"].settings)
    copy = with_flipped_bits(folder, tmp_path / "copy", count)
    size = bench.size
    attention = 2 * size.hidden**2 + 2 * size.hidden * size.hidden // (size.heads // size.key_heads)
    total = size.layers * (attention + 3 * size.hidden * size.intermediate)
    assert compare_masks(folder, copy) == (count, total)
    finding = judge_masks("wanda", folder, copy, 2.5 / total)
    assert finding.passed is (count <= 2)
    assert f"{count} of {total:,} mask bits differ" in finding.text


def test_checkpoints_of_two_models_are_not_compared(bench: Bench) -> None:
    first, _, _ = bench.prune(CPU, **MASK_CHECKS["magnitude"].settings)
    second, _, _ = bench.prune(CPU, "mixtral", **MASK_CHECKS["magnitude"].settings)
    with pytest.raises(ValueError, match="other weights"):
        compare_masks(first, second)


def test_a_cpu_is_compared_with_no_other_device(bench: Bench) -> None:
    for check in (check_masks, check_second_gpu):
        with pytest.raises(NotRunError):
            list(check(bench))


def test_one_gpu_is_no_second(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NotRunError, match=r"(?m)^PyTorch sees 1 GPU$"):
        list(check_second_gpu(bench))
