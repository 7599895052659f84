"""Whole runs with targets of linears: budgets, excluded linears, patterns, formats of weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, RebuildConfig, inspect, prune, rebuild
from llm_barber.errors import ModelError
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.pattern import NofM
from llm_barber.planning.plan import plan
from llm_barber.run.dry_run import dry_run
from llm_barber.settings.plan import PlanConfig
from tests.conftest import Listener, bits, make_model, read_folder
from tests.helpers.targeted_runs import run


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "uniform"},
        {"sparsities": {"o_proj": 0.37, "layers.1.mlp": 0.81}},
        {"allocation": "owl", "initial": "wanda"},
        {"allocation": "owl", "initial": "sparsegpt"},
        {"allocation": "loss", "initial": "alps"},
        {"preset": "best"},
    ],
    ids=str,
)
def test_a_budget_is_met_to_a_weight_in_each_linear(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]
) -> None:
    report = run(model, tmp_path / "out", tokens, sparsity=0.613, **settings)
    sparsities = settings.get("sparsities", {})
    assert isinstance(sparsities, dict)
    linears = {f"layers.{layer.index}.{linear.name}": linear for layer in report.layers for linear in layer.linears}
    wanted = {}
    for name, linear in linears.items():
        sparsity = next((value for part, value in sparsities.items() if part in name), 0.613)
        wanted[name] = sparsity * linear.shape[0] * linear.shape[1]
    by_loss = "best" in settings.values() or "loss" in settings.values()
    if sparsities or "uniform" in settings.values():
        assert all(abs(linear.pruned - wanted[name]) <= 0.5 for name, linear in linears.items())
    assert abs(report.pruned - sum(wanted.values())) <= (1 if by_loss else len(linears))


def test_the_published_method_meets_the_budget_in_each_row(tmp_path: Path, model: Path, tokens: Path) -> None:
    report = run(model, tmp_path / "out", tokens, sparsity=0.613, preset="paper")
    assert all(linear.pruned == int(0.613 * linear.shape[1]) * linear.shape[0] for linear in report.linears)


SETTINGS = [
    {"initial": "magnitude", "rebuild_ratio": 0.5},
    {"initial": "wanda", "granularity": "block", "rebuild_ratio": 0.5},
    {"initial": "sparsegpt", "granularity": "linear", "rebuild_ratio": 0.5},
    {"initial": "dsnot"},
    {"initial": "alps", "keep_updates": True},
    {"preset": "mask"},
    {"preset": "best"},
    {"allocation": "owl"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_excluded_linears_keep_their_bits(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]
) -> None:
    report = run(
        model, tmp_path / "out", tokens, exclude=("self_attn", r"1\.mlp\.up_proj"), skip_layers=(-1,), **settings
    )
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    pruned = set()
    for name, weight in written.items():
        if (weight == 0).float().mean() > 0.3:
            pruned.add(name)
        else:
            assert torch.equal(bits(weight), bits(dense[name])), name
    layers = [(0, "gate"), (0, "up"), (0, "down"), (1, "gate"), (1, "down")]
    assert pruned == {f"model.layers.{index}.mlp.{linear}_proj.weight" for index, linear in layers}
    for layer in report.layers:
        assert [linear.name for linear in layer.linears][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
        for linear in layer.linears:
            kind = linear.name.split(".")[1].removesuffix("_proj")
            assert (linear.pruned > 0) == ((layer.index, kind) in layers)
            assert linear.zeros == int(
                (written[f"model.layers.{layer.index}.{linear.name}.weight"] == 0).count_nonzero()
            )


def test_a_block_alone_is_pruned_as_in_the_whole_model(tmp_path: Path, model: Path, tokens: Path) -> None:
    """The first layer's MLP does not depend on the pruning of later layers."""
    alone = run(model, tmp_path / "alone", tokens, include=(r"layers\.0\.mlp",), rebuild_ratio=0.5)
    others = run(model, tmp_path / "others", tokens, exclude=("self_attn",), rebuild_ratio=0.5)
    assert alone.pruned < others.pruned
    for name, weight in read_folder(tmp_path / "alone").items():
        if ".layers.0." in name:
            assert torch.equal(weight, read_folder(tmp_path / "others")[name])


def test_sparsities_by_linear(tmp_path: Path, model: Path, tokens: Path) -> None:
    path = tmp_path / "sparsities.yaml"
    path.write_text('# by hand\n"mlp\\\\.down_proj$": 0.25\nv_proj: 0\n"layers\\\\.2\\\\.": 2:4\n')
    progress = Listener()
    settings = {"dtype": "float32", "sparsity": 0.5, "sparsities": path, "rebuild_ratio": 0.5}
    report = prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings), progress)
    assert not progress.warnings  # the sparsities in the file count as requested
    for layer in report.layers:
        for linear in layer.linears:
            expected = 0.5
            if linear.name.endswith("down_proj"):
                expected = 0.25
            elif linear.name.endswith("v_proj"):
                expected = 0
            elif layer.index == 2:
                assert linear.pattern == "2:4"
                weight = read_folder(tmp_path / "out")[f"model.layers.2.{linear.name}.weight"]
                assert holds(NofM(2, 4), weight != 0)
            assert linear.sparsity == expected
    # A run depends on the file's content, not on its name.
    assert report.settings["sparsities"] == {"mlp\\.down_proj$": 0.25, "v_proj": 0, "layers\\.2\\.": "2:4"}


@pytest.mark.parametrize(
    "settings", [{"preset": "best"}, {"pattern": "2:4", "preset": "mask"}, {"initial": "sparsegpt"}]
)
def test_weights_that_are_stored_transposed(tmp_path: Path, tokens: Path, settings: dict[str, object]) -> None:
    """GPT-2 stores weights as (in, out); the record and `inspect` give shapes and N:M of (out, in)."""
    model = make_model(tmp_path / "gpt2", "gpt2")
    report = run(model, tmp_path / "out", tokens, **settings)
    assert report.layers[0].linears[0].shape == (96, 32)
    written = read_folder(tmp_path / "out")
    weight = written["transformer.h.0.attn.c_attn.weight"]
    assert weight.shape == (32, 96)
    if "pattern" in settings:
        assert holds(NofM(2, 4), weight.t() != 0)
        assert not holds(NofM(2, 4), weight != 0)
    inspection = inspect(InspectConfig(model=tmp_path / "out", dense=model))
    assert not inspection.problems
    assert inspection.linears[0].shape == (96, 32)
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(8)[None]).logits).all()
    if "preset" not in settings:
        again = rebuild(
            RebuildConfig(dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens)
        )
        assert again.pruned == report.pruned


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4", "sparsities": {"q_proj": 0.3}, "granularity": "block", "rebuild_ratio": 0.5},
        {"initial": "magnitude", "sparsities": {"q_proj": "2:4", "gate": "2:4"}},
    ],
)
def test_rebuilding_blocks_of_both_kinds_keeps_the_number_of_weights(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]
) -> None:
    plain = run(
        model, tmp_path / "plain", tokens, **{**settings, "granularity": None, "rebuild_ratio": None}, rebuild=False
    )
    report = run(model, tmp_path / "out", tokens, **settings)
    assert report.pruned == plain.pruned
    assert report.swapped > 0
    for layer in report.layers:
        for block in layer.blocks:
            assert sum(linear.grown for linear in block.linears) == sum(linear.dropped for linear in block.linears)


def test_rebuild_does_not_change_unpruned_linears(tmp_path: Path, model: Path, tokens: Path) -> None:
    pruned = run(model, tmp_path / "out", tokens, initial="magnitude", exclude=("q_proj", "gate"), skip_layers=(0, 1))
    assert pruned.pattern == "unstructured"
    again = rebuild(
        RebuildConfig(
            dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens, rebuild_ratio=0.5,
            granularity="block",
        )
    )  # fmt: skip
    assert again.pruned == pruned.pruned
    dense, written = read_folder(model), read_folder(tmp_path / "again")
    for name, weight in written.items():
        if "layers.2" not in name or "q_proj" in name or "gate" in name:
            assert torch.equal(bits(weight), bits(dense[name]))


def test_excluded_linears_do_not_count_for_the_pattern(tmp_path: Path, model: Path, tokens: Path) -> None:
    report = run(model, tmp_path / "out", tokens, initial="wanda", pattern="2:4", exclude=("self_attn",))
    assert report.pattern == "2:4"
    assert "exclude self_attn" in report.changes
    shown = dry_run(
        PruneConfig(model=model, output=tmp_path / "no", calibration=tokens, exclude=("self_attn",), skip_layers="0,-1")
    )
    assert (shown.linears, shown.weights) == (3, 3 * 32 * 64)
    assert (shown.allocation, shown.refinement is not None) == ("loss", True)


def test_a_model_without_its_output_head_is_refused_before_the_run(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "untied", "mistral")
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        dry_run(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens))
    run(model, tmp_path / "out", tokens, allocation="uniform")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_small_budget_and_half_precision(tmp_path: Path, model: Path, tokens: Path, dtype: str) -> None:
    config = PruneConfig(
        model=model, output=tmp_path / "out", calibration=tokens, sparsity=0.02, preset="mask", dtype=dtype
    )
    report = prune(config)
    assert abs(report.pruned - 0.02 * report.weights) <= 1
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize("preset", ["paper", "mask", "best"])
def test_double_precision(tmp_path: Path, tokens: Path, preset: str) -> None:
    model = make_model(tmp_path / "wide", "llama", dtype=torch.float64)
    report = run(model, tmp_path / "out", tokens, preset=preset, sparsity=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert {tensor.dtype for tensor in read_folder(tmp_path / "out").values()} == {torch.float64}


@pytest.mark.parametrize("preset", ["paper", "mask"])
def test_layers_without_linears_of_the_chosen_blocks(tmp_path: Path, tokens: Path, preset: str) -> None:
    """The first layer of Qwen3-MoE has a dense MLP and no experts."""
    model = make_model(tmp_path / "mixture", "qwen3_moe")
    (tmp_path / "blocks.yaml").write_text("experts: {output: mlp, linears: ['mlp.experts.*.down_proj']}")
    report = run(model, tmp_path / "out", tokens, blocks=tmp_path / "blocks.yaml", preset=preset)
    assert [len(layer.linears) for layer in report.layers] == [0, 4]
    assert report.pruned == report.weights // 2
    forecast = plan(PlanConfig(model=str(model), blocks=tmp_path / "blocks.yaml", tflops=1, seqlen=16))
    assert forecast.weights == report.weights


def test_chat_templates_are_copied_and_checked(tmp_path: Path, tokens: Path, model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    run(model, tmp_path / "out", tokens, preset="paper")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems == ()
    (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")
    (problem,) = inspect(InspectConfig(model=tmp_path / "out")).problems
    assert problem.startswith("additional_chat_templates/tool_use.jinja has changed")
