"""Attention and MLPs of every family keep their bits with rotary embeddings and activated gates in one operation."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from llm_barber.model import fused_gates, fused_rotary
from llm_barber.model.experts import Experts, split_experts
from llm_barber.model.fused_gates import fuse_gates, gated_mlps
from llm_barber.model.fused_rotary import fuse_rotary, is_rotary
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES, auto_class, make_config

# Families whose MLPs, and experts, have one linear before the activation, or limits.
OTHER_MLPS = {
    "apertus", "arcee", "bloom", "falcon", "falcon-rw", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "mpt",
    "nemotron", "nemotron_h", "opt", "opt-350m", "phi", "starcoder2",
}  # fmt: skip
# Families that rotate neighbours, a part of the features, by another function, or not at all.
OTHER_ROTATIONS = {
    "bamba", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "deepseek_v32",
    "falcon-rw", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granitemoehybrid", "jamba",
    "modernbert-decoder", "mpt", "nemotron", "nemotron_h", "opt", "opt-350m", "qwen3_5", "qwen3_5-whole", "qwen3_next",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_keep_their_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(family)
    model = auto_class(config).from_config(config).eval()
    split_experts(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    calls: Counter[str] = Counter()
    for module, name in ((fused_rotary, "rotate"), (fused_gates, "gate")):
        monkeypatch.setattr(module, name, counting(calls, name, getattr(module, name)))
    tokens = torch.randint(100, (2, 9), generator=generator)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        fuse_rotary(model)
        fuse_gates(model)
        calls.clear()
        after = model(input_ids=tokens).logits
    if any(isinstance(module, Experts) for module in model.modules()):
        # Their gates are joined with what they multiply. A CPU computes SiLU otherwise where rows are not contiguous.
        torch.testing.assert_close(before, after)
    else:
        assert torch.equal(before, after)
    assert bool(calls["gate"]) is (family not in OTHER_MLPS)
    assert bool(calls["rotate"]) is (family not in OTHER_ROTATIONS)


def counting(calls: Counter[str], name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*given: Any) -> Tensor:
        calls[name] += 1
        return function(*given)

    return call


class Mlp(nn.Module):
    """SwiGLU with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.change = change
        if change == "parameter":
            self.scale = nn.Parameter(torch.ones(8))
        if change == "buffer":
            self.register_buffer("scale", torch.ones(8))
        self.limits: tuple[float, ...] | None = None
        self._limit = torch.inf
        self.activation: Callable[[Tensor], Tensor] = relu if change == "relu" else silu

    def forward(self, hidden: Tensor) -> Any:
        gates = self.second(hidden)
        activated = self.activation(gates) if self.limits is None else self.activation(gates).clamp(max=self.limits[0])
        ups = self.first(hidden) + (1 if self.change == "offset" else 0)
        output = self.third(activated * (ups.clamp(max=16) if self.change == "limit" else ups))
        return (output,) if self.change == "tuple" else output.clamp(max=self._limit)


def test_linears_are_known_by_what_they_do() -> None:
    ((_, roles),) = gated_mlps(nn.ModuleList([Mlp()]))
    assert (roles.gate, roles.up, roles.down, roles.activation) == ("second", "first", "third", "silu")


@pytest.mark.parametrize("change", ["parameter", "buffer", "relu", "offset", "limit", "tuple"])
def test_an_mlp_that_computes_something_else_is_left_alone(change: str) -> None:
    assert not list(gated_mlps(nn.ModuleList([Mlp(change)])))
    for order in ([Mlp(change), Mlp()], [Mlp(), Mlp(change)]):
        assert len(list(gated_mlps(nn.ModuleList(order)))) == 1


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


def test_mlps_of_one_class_are_told_apart_by_their_functions() -> None:
    mlps = nn.ModuleList([Mlp(), Mlp(), Mlp(), Mlp(), Mlp(), Mlp()])
    mlps[1].activation = relu
    mlps[2].limits = (7.0,)
    mlps[3].activation = gelu
    mlps[4].activation = partial(gelu, approximate="tanh")
    mlps[5]._limit = 0.1
    found = [(module, roles.activation) for module, roles in gated_mlps(mlps)]
    assert found == [(mlps[0], "silu"), (mlps[3], "gelu"), (mlps[4], "gelu_tanh")]


@pytest.mark.parametrize("width", [4, 8])
def test_a_part_of_the_features_is_rotated_by_transformers(width: int) -> None:
    original = modeling_gpt_neox.apply_rotary_pos_emb
    assert is_rotary(original)
    queries, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    cosine, sine = torch.randn(2, 1, 5, width)
    expected = original(queries, keys, cosine, sine)
    result = fused_rotary._rotate_both(original, queries, keys, cosine, sine)
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


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
