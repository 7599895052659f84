"""The analysis finds the structure of the record; ambiguous and unknown structures are refused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, inspect, prune
from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.model.architecture import ARCHITECTURES, Block
from llm_barber.model.empty import empty_model
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.stated_structure import check_blocks
from llm_barber.model.structure import analyse, find_architecture, find_layers
from llm_barber.planning.description import structure_lines
from tests.conftest import FOUND, KNOWN, LLAMA_LIKE, make_config, make_model, save_tokens

BLOCKS = "only: {output: mlp, linears: [mlp.up_proj, mlp.down_proj]}\n"


@pytest.mark.parametrize("family", KNOWN)
def test_what_is_found_is_what_the_record_says(family: str) -> None:
    config = make_config(family)
    analysed, record = analyse(config), ARCHITECTURES[config.model_type]
    assert (analysed.layers, analysed.transposed) == (record.layers, record.transposed)
    for layer in empty_model(config, torch.float32).get_submodule(record.layers):
        pairs = zip(analysed.blocks_of(layer), record.blocks_of(layer), strict=True)
        for block, expected in pairs:
            assert (block.name, block.output, set(block.linears)) == (
                expected.name,
                expected.output,
                set(expected.linears),
            )


WITH_IMAGES = ("gemma3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm")
# By layer: the blocks, and how many linears each has; what steers (routers, time steps) is not among them.
EXPECTED = {
    "bamba": [{"state space": 2, "mlp": 3}, {"attention": 4, "mlp": 3}],
    "falcon_h1": [{"state space": 2, "attention": 4, "mlp": 3}] * 2,
    "gpt_oss": [{"attention": 4, "mlp": 8}] * 2,
    "granitemoe": [{"attention": 4, "mlp": 12}] * 2,
    "granitemoehybrid": [{"state space": 2, "mlp": 12, "shared_mlp": 2}, {"attention": 4, "mlp": 12, "shared_mlp": 2}],
    "jamba": [{"state space": 3, "mlp": 3}, {"attention": 4, "mlp": 12}],
    "modernbert-decoder": [{"attention": 4, "mlp": 2}] * 2,
    "nemotron_h": [{"mixer": 2}, {"mixer": 10}, {"mixer": 4}],
    "qwen3_next": [{"linear attention": 3, "mlp": 15}, {"attention": 4, "mlp": 15}],
    **dict.fromkeys(WITH_IMAGES, [{"attention": 4, "mlp": 3}] * 2),
    "qwen3_5": [{"linear attention": 3, "mlp": 3}, {"attention": 4, "mlp": 3}],
    "qwen3_5-whole": [{"linear attention": 3, "mlp": 3}, {"attention": 4, "mlp": 3}],
    "deepseek_v32": [{"attention": 5, "mlp": 3}, {"attention": 5, "mlp": 27}],
}


def test_a_plan_says_what_stays_dense() -> None:
    config = make_config("mixtral")
    architecture = find_architecture(config)
    skeleton = Skeleton(config, architecture, torch.device("cpu"), torch.float32)
    lines = structure_lines(skeleton, known=True)
    assert lines[-1] == "stays dense: mlp.gate (4 × 32)"
    assert "stays dense" not in " ".join(lines[:-1])


@pytest.mark.parametrize("family", FOUND)
def test_blocks_of_families_without_a_record(family: str) -> None:
    config = make_config(family)
    architecture = find_architecture(config)
    layers = empty_model(config, torch.float32).get_submodule(architecture.layers)
    blocks = [{block.name: len(block.linears) for block in architecture.blocks_of(layer)} for layer in layers]
    assert blocks == EXPECTED[family]
    assert not [
        linear for linear in architecture.linears if "router" in linear or "gate." in linear or "dt_proj" in linear
    ]


def test_a_router_with_a_name_of_its_own_is_no_linear_to_prune() -> None:
    config = AutoConfig.for_model(
        "hunyuan_v1_moe", **{**LLAMA_LIKE, "head_dim": 8, "pad_token_id": 0, "num_experts": 4, "moe_topk": 2}
    )
    architecture = find_architecture(config)
    assert [name for name in architecture.linears if "gate." in name or name.endswith("wg")] == []
    assert "mlp.experts.*.gate_proj" in architecture.linears


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_next", {"num_experts": 16, "shared_expert_intermediate_size": 16}),
        ("granitemoe", {"num_local_experts": 16}),
    ],
)
def test_experts_whose_inner_size_is_their_number_are_no_routers(family: str, changes: dict[str, int]) -> None:
    """Experts like those of Qwen3-Next-80B-A3B: 512 of inner size 512."""
    changed, usual = find_architecture(make_config(family, **changes)), find_architecture(make_config(family))
    assert changed == usual


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("zaya", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 1}, "which the layer before has made"),
        ("dory", {"head_dim": 8}, "more than once"),
    ],
)
def test_layers_that_need_each_other_are_refused(family: str, settings: dict[str, int], message: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {family}")
    with pytest.raises(ModelError, match=message):
        find_architecture(AutoConfig.for_model(family, **{**LLAMA_LIKE, "pad_token_id": 0, **settings}))


def test_what_layers_are_passed_may_not_depend_on_the_tokens(tmp_path: Path) -> None:
    """Gemma 4 hands each layer an embedding of the tokens of its own."""
    config = AutoConfig.for_model(
        "gemma4_text", **LLAMA_LIKE, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(ModelError, match="'per_layer_input', which depends on the tokens"):
        prune(PruneConfig(model=tmp_path / "dense", output=tmp_path / "out", calibration=tokens, dtype="float32"))


def test_a_list_directly_beside_the_token_embedding_comes_first() -> None:
    """Phi-4-multimodal has lists that see and hear beside it, one module deeper."""
    model = empty_model(make_config("llama"), torch.float32)
    model.model.images = nn.Module()
    model.model.images.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
    assert find_layers(model) == "model.layers"
    model.model.images.layers.extend(nn.Linear(128, 128) for _ in range(30))
    assert find_layers(model) == "model.images.layers"  # much larger; refused later, since text does not reach it


def test_several_lists_of_layers_are_ambiguous() -> None:
    model = nn.Module()
    model.encoder = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model.decoder = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])) for _ in range(3)])
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="several lists of layers: encoder, decoder") as caught:
        find_layers(model)
    assert caught.value.hint == "choose: --layers PATH; smaller lists are small"
    del model.encoder
    assert find_layers(model) == "decoder"
    with pytest.raises(ModelError, match="no list of layers"):
        find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("roberta", {}, "is an encoder"),
        ("t5", {}, "is an encoder, or has one"),
        ("whisper", {}, "is an encoder, or has one"),
        ("vit", {}, "no language model that transformers builds by itself"),
        ("jetmoe", LLAMA_LIKE, "keeps weights stacked in"),
        ("llama4_text", LLAMA_LIKE, "computed in a way of their own"),
    ],
)
def test_what_cannot_be_pruned_is_refused(model_type: str, settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        find_architecture(AutoConfig.for_model(model_type, **settings))
    assert caught.value.hint


def test_a_user_decides(tmp_path: Path) -> None:
    file = tmp_path / "blocks.yaml"
    file.write_text(BLOCKS)
    dense, tokens = make_model(tmp_path / "dense", "llama"), save_tokens(tmp_path / "tokens.safetensors")
    config = PruneConfig(
        model=dense, output=tmp_path / "out", layers="model.layers", blocks=file, calibration=tokens, dtype="float32"
    )
    report = prune(config)
    assert {linear.name for linear in report.linears} == {"mlp.up_proj", "mlp.down_proj"}
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    inspection = inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(dense)))
    assert inspection.problems == ()
    assert len(inspection.linears) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "model.norm"}, "model.norm is not the path of a list of decoder layers"),
        ({"layers": "model.nothing"}, "model.nothing is not the path of a list of decoder layers"),
        ({"blocks": BLOCKS.replace("output: mlp", "output: mpl")}, "no layer has a module 'mpl'"),
        ({"blocks": BLOCKS.replace("mlp.up_proj", "mlp.upp")}, "no layer has a linear 'mlp.upp'"),
        ({"blocks": BLOCKS.replace("mlp.up_proj", "input_layernorm")}, "'input_layernorm' is not a linear"),
        ({"blocks": BLOCKS.replace("mlp.up_proj", "self_attn.q_proj")}, "'self_attn.q_proj' is not inside 'mlp'"),
        ({"blocks": BLOCKS.replace("mlp.up_proj", "mlp.down_proj")}, "'mlp.down_proj' is there twice"),
        ({"blocks": "only: {output: mlp, linears: mlp.up_proj}"}, "block only is not described"),
        ({"blocks": "{}"}, "does not describe blocks"),
        ({"blocks": "only: [mlp]"}, "block only is not described"),
        ({"blocks": "only: {output: mlp, linears: [[1]]}"}, "block only is not described"),
        ({"blocks": BLOCKS + BLOCKS}, "only is there twice"),
        ({"blocks": "{"}, "blocks.yaml cannot be read"),
        ({"blocks": "only: {output: mlp, linears: []}"}, "block only is not described"),
        (
            {"blocks": BLOCKS + "again: {output: mlp, linears: [mlp.gate_proj]}"},
            "'mlp' is the output of two blocks",
        ),
        (
            {"blocks": BLOCKS + "late: {output: self_attn, linears: [self_attn.q_proj]}"},
            "layer 0 computes self_attn, then mlp",
        ),
        (
            {"blocks": BLOCKS + "b: {output: mlp.gate_proj, linears: [mlp.gate_proj]}"},
            "'mlp.gate_proj' is inside 'mlp'",
        ),
        (
            {"blocks": "a: {output: mlp.up_proj, linears: [mlp.gate_proj, mlp.up_proj]}"},
            "'mlp.up_proj' does not depend on 'mlp.gate_proj'",
        ),
        ({"blocks": "only: {output: mlp, linears: [mlp.up_proj], extra: 3}"}, "block only is not described"),
    ],
)
def test_a_wrong_structure_says_what_there_is(tmp_path: Path, options: dict[str, str], message: str) -> None:
    arguments: dict = {**options}
    if "blocks" in arguments:
        arguments["blocks"] = tmp_path / "blocks.yaml"
        arguments["blocks"].write_text(options["blocks"])
    with pytest.raises(SettingsError, match=message) as caught:
        settings = PruneConfig(model="x", output=tmp_path / "out", **arguments)
        find_architecture(make_config("llama"), settings.structure)
    assert caught.value.hint


@pytest.mark.parametrize("wrong", ["mlp.experts.*.proj", "mlp.exp.*.down_proj", "mlp.experts.*.nothing"])
def test_a_part_of_a_name_does_not_stand_for_linears_of_experts(wrong: str) -> None:
    """Otherwise they would silently stay dense."""
    layers = empty_model(make_config("mixtral"), torch.float32).model.layers
    right = ("mlp.experts.*.gate_proj", "mlp.experts.*.down_proj")
    check_blocks((Block("mlp", "mlp", right),), layers)
    with pytest.raises(SettingsError, match=f"no layer has a linear '{re.escape(wrong)}'"):
        check_blocks((Block("mlp", "mlp", (*right, wrong)),), layers)


def test_errors_of_models_that_cannot_be_built_are_told() -> None:
    with pytest.raises(BarberError, match="cannot build 'dbrx' from config.json"):
        find_architecture(AutoConfig.for_model("dbrx", d_model=32, n_layers=1, n_heads=4, vocab_size=64))
