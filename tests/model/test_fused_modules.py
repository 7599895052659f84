"""Attention and MLPs of every family keep their bits with rotary embeddings and SwiGLU in one operation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama import modeling_llama

from llm_barber.model.empty import empty_model
from llm_barber.model.experts import Experts
from llm_barber.model.fused_gates import fuse_gates, gated_mlps
from llm_barber.model.fused_rotary import fuse_rotary, is_rotary
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES, make_config

# Families whose MLPs, and experts, are no SwiGLU: one linear before the activation, GELU, or limits.
OTHER_MLPS = {
    "apertus", "arcee", "bloom", "falcon", "falcon-rw", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "gptj",
    "modernbert-decoder", "mpt", "nemotron", "nemotron_h", "opt", "opt-350m", "phi", "starcoder2",
}  # fmt: skip
# Families that rotate neighbours, or by another function, or not at all.
OTHER_ROTATIONS = {
    "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v2-lite", "gpt2", "gpt_bigcode", "gpt_oss", "gptj", "jamba",
    "modernbert-decoder", "mpt", "nemotron_h", "opt", "opt-350m",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_every_family_keep_their_bits(family: str) -> None:
    config = make_config(family)
    model = empty_model(config, torch.bfloat16)
    layers = model.get_submodule(find_architecture(config).layers).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    mlps = list(gated_mlps(layers))
    experts = [module for module in layers.modules() if isinstance(module, Experts)]
    names = {module: forward_name(module) for module in layers.modules()}
    width = config.get_text_config().hidden_size
    hidden = torch.randn(1, 9, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = [module(hidden) for module, _ in mlps] + [mixture(module, hidden) for module in experts]
    combined = [module.combine for module in experts]
    fuse_gates(layers)
    after = [module(hidden) for module, _ in mlps] + [mixture(module, hidden) for module in experts]
    assert all(torch.equal(*outputs) for outputs in zip(before, after, strict=True))
    gated = bool(mlps) or any(module.combine is not old for module, old in zip(experts, combined, strict=True))
    assert gated is (family not in OTHER_MLPS)
    changed = {module for module in layers.modules() if forward_name(module) != names[module]}
    assert changed == {module for module, _ in mlps}
    fuse_rotary(layers)
    rotating = {module for module in layers.modules() if forward_name(module) != names[module]} - changed
    assert bool(rotating) is (family not in OTHER_ROTATIONS)


def forward_name(module: nn.Module) -> str:
    return "fused" if "forward" in vars(module) else "module's"


def mixture(experts: Experts, hidden: Tensor) -> Tensor:
    """Output of experts whose tokens go to the first and the last one."""
    tokens = hidden[0]
    places = torch.tensor([[0, len(experts) - 1]]).expand(len(tokens), 2)
    output: Tensor = experts(tokens, places, torch.full(places.shape, 0.5, dtype=tokens.dtype))
    return output


class Mlp(nn.Module):
    """SwiGLU with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.change = change
        if change == "parameter":
            self.scale = nn.Parameter(torch.ones(8))

    def forward(self, hidden: Tensor) -> Any:
        gates = self.second(hidden)
        activated = torch.nn.functional.gelu(gates) if self.change == "gelu" else silu(gates)
        ups = self.first(hidden) + (1 if self.change == "offset" else 0)
        output = self.third(activated * ups.clamp(max=1) if self.change == "limit" else activated * ups)
        return (output,) if self.change == "tuple" else output


def test_linears_are_known_by_what_they_do() -> None:
    ((_, roles),) = gated_mlps(nn.ModuleList([Mlp()]))
    assert (roles.gate, roles.up, roles.down) == ("second", "first", "third")


@pytest.mark.parametrize("change", ["parameter", "gelu", "offset", "limit", "tuple"])
def test_an_mlp_that_computes_something_else_is_left_alone(change: str) -> None:
    assert not list(gated_mlps(nn.ModuleList([Mlp(change)])))
    assert len(list(gated_mlps(nn.ModuleList([Mlp(change), Mlp()])))) == 1


def test_a_fused_mlp_keeps_hooks_and_gradients_and_the_state_of_random_numbers() -> None:
    mlp, seen = Mlp(), []
    mlp.third.register_forward_hook(lambda *_: seen.append("down"))
    mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    hidden = torch.randn(2, 3, 8)
    expected = torch.autograd.grad(mlp(hidden).sum(), list(mlp.parameters()))
    state = torch.get_rng_state()
    fuse_gates(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    seen.clear()
    gradients = torch.autograd.grad(mlp(hidden=hidden).sum(), list(mlp.parameters()))
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert seen == ["down", "mlp"]


def test_functions_that_rotate_otherwise_are_left_alone() -> None:
    right = modeling_llama.apply_rotary_pos_emb
    assert is_rotary(right)
    assert not is_rotary(None)
    assert not is_rotary(lambda queries, keys, cosine, sine: (queries, keys))
    assert not is_rotary(lambda queries, keys, cosine, sine: right(queries, keys, cosine, -sine))
    assert not is_rotary(lambda queries, keys, cosine, sine: right(queries, keys, cosine, sine)[0])
    assert not is_rotary(lambda queries: queries)


def test_transformers_own_function_is_back_after_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("llama")
    attention = modeling_llama.LlamaAttention(config, 0)
    original, seen = modeling_llama.apply_rotary_pos_emb, []
    angles = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(5)[None])
    hidden = torch.randn(2, 5, config.hidden_size)
    expected = attention(hidden, angles)[0]
    fuse_rotary(attention)

    def project(*_: Any) -> None:
        seen.append(modeling_llama.apply_rotary_pos_emb)

    attention.v_proj.register_forward_hook(project)
    assert torch.equal(attention(hidden, position_embeddings=angles)[0], expected)
    assert seen[0] is not original
    assert modeling_llama.apply_rotary_pos_emb is original
    with pytest.raises(TypeError):
        attention(hidden, None)
    assert modeling_llama.apply_rotary_pos_emb is original


def test_other_arguments_go_to_transformers_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_barber.model import fused_rotary

    calls: list[int] = []
    rotate = fused_rotary.rotate
    monkeypatch.setattr(fused_rotary, "rotate", lambda *tensors: calls.append(1) or rotate(*tensors))
    original = modeling_llama.apply_rotary_pos_emb
    queries, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    cosine, sine = torch.randn(2, 1, 5, 8)
    for named, dtype, fused in (
        ({}, torch.float32, 2),
        ({"unsqueeze_dim": 1}, torch.float32, 0),
        ({}, torch.bfloat16, 0),
    ):
        calls.clear()
        expected = original(queries.to(dtype), keys, cosine, sine, **named)
        result = fused_rotary._rotate_both(original, queries.to(dtype), keys, cosine, sine, **named)
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))
        assert len(calls) == fused


def test_a_cpu_computes_transformers_own_modules() -> None:
    config = make_config("llama")
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    assert not any("forward" in vars(module) for module in skeleton.layers.modules())
