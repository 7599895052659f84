"""Sizes of models, read off empty ones."""

from typing import Any

import pytest
from transformers import LlamaConfig

from llm_barber.model.device import experts_per_token
from llm_barber.planning.costs import run_costs
from llm_barber.planning.memory import peak_footprint
from llm_barber.planning.recipe import Recipe
from tests.conftest import FAMILIES, make_config
from tests.helpers.plans import LLAMA_8B, LLAMA_70B, MASK, PAPER, shapes_of


@pytest.mark.parametrize(
    ("settings", "parameters", "weights"),
    [(LLAMA_8B, 8_030_261_248, 6_979_321_856), (LLAMA_70B, 70_553_706_496, 68_451_041_280)],
)
def test_llama_3_to_the_digit(settings: dict[str, Any], parameters: int, weights: int) -> None:
    model = shapes_of(settings)
    assert (model.parameters, model.weights) == (parameters, weights)
    recipe = Recipe(**{**PAPER.__dict__, "sequences": 128, "tokens": 2048})
    # 128 · 2048 tokens through all linears: 2 FLOPs a weight and token.
    assert run_costs(model, recipe).propagate.products == 2 * 128 * 2048 * weights
    peak = peak_footprint(model, Recipe(**{**recipe.__dict__, "on_cpu": False, "batch": 8}))
    stream = 128 * 2048 * model.hidden * 2
    # Beside three streams: a set of activations and a layer that are still being written.
    layer = model.layers[0].parameters * 2
    assert 3 * stream < peak.host < 4 * stream + 5 * layer + 3 * 2**30
    # Weights and pruned ones in two bytes, masks, squares of gradients in four.
    assert 6 * model.layers[0].weights < peak.device < 50 * model.layers[0].weights


@pytest.mark.parametrize(("family", "stored"), [("gemma2", 16), ("llama", 0)])
def test_attention_that_stores_scores_has_their_bytes(family: str, stored: int) -> None:
    settings = FAMILIES[family]
    (attention, mlp) = shapes_of(settings, family).layers[0].blocks
    assert (attention.score_bytes, mlp.score_bytes) == (stored * make_config(family).num_attention_heads, 0)


def test_experts_get_their_share_of_the_tokens() -> None:
    """Qwen2-MoE's shapes: a dense layer, and one of four experts, two for each token, with a shared one."""
    model = shapes_of(FAMILIES["qwen2_moe"], "qwen2_moe")
    dense, mixture = model.layers
    assert [block.copies for block in dense.blocks] == [1, 1]
    (attention, *parts) = mixture.blocks
    experts, shared = sorted(parts, key=lambda part: -part.copies)
    assert (experts.copies, experts.share, experts.linears) == (4, 0.5, ((16, 32), (16, 32), (32, 16)))
    assert (shared.copies, shared.share, shared.linears) == (1, 1, ((48, 32), (48, 32), (32, 48)))
    assert experts.other_weights == shared.weights
    assert shared.other_weights == experts.all_weights == 4 * experts.weights
    assert mixture.weights == attention.weights + 4 * experts.weights + shared.weights
    tokens = PAPER.sequences * PAPER.tokens
    active = attention.weights + 2 * experts.weights + shared.weights
    assert run_costs(model, PAPER).propagate.products == 2 * tokens * (dense.weights + active)
    assert run_costs(model, MASK).total.flops > run_costs(model, PAPER).total.flops
    assert peak_footprint(model, PAPER).host > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_architecture_has_shapes(family: str) -> None:
    model = shapes_of(FAMILIES[family], family)
    assert model.hidden == 32
    assert model.vocabulary == 128
    assert all(layer.weights <= layer.parameters for layer in model.layers)
    attending = [block.attention_width for layer in model.layers for block in layer.blocks if block.name == "attention"]
    assert set(attending) <= {32}
    assert run_costs(model, MASK).total.flops > 0


@pytest.mark.parametrize("name", ["num_experts_per_tok", "moe_topk", "moe_k"])
def test_experts_for_each_token_by_any_name(name: str) -> None:
    assert experts_per_token(LlamaConfig(**{name: 4})) == 4
    assert experts_per_token(LlamaConfig(moe_topk=[2, 6])) == 6
    assert experts_per_token(LlamaConfig()) == 1
