"""Models loaded by us equal those that transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llm_barber import PackConfig, PruneConfig, load, pack, prune
from llm_barber.checkpoint.memory import Memory, copied
from llm_barber.errors import ModelError
from llm_barber.progress import Silent
from llm_barber.runtime.packed_linear import PackedLinear
from tests.conftest import change_json, load_model, make_model, save_tokens


@pytest.fixture(params=["tied", "untied", "qwen2", "gpt_neox"])
def pruned(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family = "llama" if "tied" in request.param else request.param
    tied = {"tie_word_embeddings": request.param == "tied"} if family == "llama" else {}
    model = make_model(tmp_path / "dense", family, dtype=torch.bfloat16, **tied)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, sparsity=0.6, report=False))
    return tmp_path / "pruned"


def test_equals_what_transformers_loads(tmp_path: Path, pruned: Path) -> None:
    pack(PackConfig(model=pruned, output=tmp_path / "packed"))
    ids = load_file(tmp_path / "tokens.safetensors")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(pruned)
    for folder in (pruned, tmp_path / "packed"):
        dense = load(folder)
        assert dense.dtype == torch.bfloat16
        for name, parameter in expected.named_parameters():
            assert torch.equal(dense.get_parameter(name), parameter), name
        kept = load(folder, keep_packed=True)
        assert any(isinstance(module, PackedLinear) for module in kept.modules())
        with torch.no_grad():
            logits = expected(ids).logits
            assert torch.equal(dense(ids).logits, logits)
            assert torch.equal(kept(ids).logits, logits)
            words = expected.generate(ids[:2, :4], max_new_tokens=5, do_sample=False)
            assert torch.equal(kept.generate(ids[:2, :4], max_new_tokens=5, do_sample=False), words)
        assert "kept=" in repr(kept)


def test_tensors_are_copied_from_the_file_once(tmp_path: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays as it is stored is read into the memory that it keeps; converted tensors are copied again."""
    again: list[torch.dtype] = []

    def recorded(tensor: torch.Tensor, memory: Memory) -> torch.Tensor:
        again.append(tensor.dtype)
        return copied(tensor, memory)

    pack(PackConfig(model=pruned, output=tmp_path / "packed"))
    monkeypatch.setattr("llm_barber.runtime.huge_pages.copied", recorded)
    for folder, keep_packed in ((pruned, False), (tmp_path / "packed", False), (tmp_path / "packed", True)):
        load(folder, keep_packed=keep_packed)
    assert not again
    load(pruned, dtype=torch.float32)
    assert set(again) == {torch.float32}


def test_packed_linears_take_less_memory(tmp_path: Path) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, preset="paper", report=False))
    kept = load(tmp_path / "pruned", keep_packed=True)
    linears = [module for module in kept.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    stored = sum(module.values.numel() * 2 + module.bits.numel() for module in linears)
    dense = sum(module.shape[0] * module.shape[1] * 2 for module in linears)
    assert stored <= 0.57 * dense


def test_dtype_and_bad_input(tmp_path: Path, llama: Path) -> None:
    assert load(llama, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ModelError, match="no such model"):
        load(tmp_path / "none")
    whole = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(whole | {name: whole[name].to(torch.int8)}, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} is I8; "):
        load(llama)
    change_json(llama / "config.json", hidden_size=16)
    with pytest.raises(ModelError, match="the configuration says"):
        load(llama)
    change_json(llama / "config.json", hidden_act="nonsense")
    with pytest.raises(ModelError, match=r"config.json of .* cannot be used: .*nonsense"):
        load(llama)


def test_a_damaged_generation_config_is_refused_with_a_hint(llama: Path) -> None:
    (llama / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(ModelError, match=r"generation_config\.json in .* cannot be used: `max_new_tokens`") as caught:
        load(llama)
    assert "remove it" in caught.value.hint
    (llama / "generation_config.json").unlink()
    assert load(llama).generation_config is not None


def test_progress_is_told_of_each_parameter(llama: Path) -> None:
    class Counter(Silent):
        def __init__(self) -> None:
            self.started: list[tuple[str, int]] = []
            self.names: list[str] = []

        def start(self, title: str, total: int, finished: int = 0) -> None:
            self.started.append((title, total))

        def advance(self, detail: str) -> None:
            self.names.append(detail)

    progress = Counter()
    model = load(llama, progress=progress)
    assert progress.names == [name for name, _ in model.named_parameters()]
    assert progress.started == [(f"loading {llama}", len(progress.names))]


@pytest.mark.parametrize("family", ["deepseek_v3", "lfm2_moe"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_buffers_have_the_dtype_that_transformers_gives_them(tmp_path: Path, family: str, stored: torch.dtype) -> None:
    folder = make_model(tmp_path / "model", family)
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = dict(load_model(folder, dtype=torch.float32).named_buffers())
    buffers = dict(load(folder, dtype=torch.float32).named_buffers())
    names = [name for name in expected if name.endswith(("score_correction_bias", "expert_bias"))]
    assert names
    for name in names:
        assert buffers[name].dtype == expected[name].dtype
        assert torch.equal(buffers[name], expected[name])


def test_a_buffer_of_the_model_itself_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.__init__

    def with_buffer(model: LlamaForCausalLM, config: Any) -> None:
        plain(model, config)
        model.register_buffer("scale", torch.ones(3))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    folder = make_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "scale": torch.tensor([1.0, 2.0, 3.0])}, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).get_buffer("scale").tolist() == [1, 2, 3]
