"""What is pruned and how much of it: include, exclude, skip-layers, sparsities of linears' own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, RebuildConfig, RunReport, inspect, prune, rebuild
from llm_barber.errors import ModelError, SettingsError
from llm_barber.masking.held_patterns import holds
from llm_barber.masking.pattern import NofM, Unstructured, parse_pattern
from llm_barber.planning.plan import plan as forecast
from llm_barber.progress import Silent
from llm_barber.run.dry_run import dry_run
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.targets import EXAMPLE, Targets, parse_target, read_targets
from tests.conftest import bits, make_model, read_folder, save_tokens

HALF = Unstructured(0.5)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return save_tokens(tmp_path / "tokens.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)


def run(model: Path, output: Path, tokens: Path, **settings: object) -> RunReport:
    config = {"dtype": "float32", "report": False, **settings}
    return prune(PruneConfig(model=model, output=output, calibration=tokens, **config))


def test_each_part_by_hand() -> None:
    targets = Targets(
        HALF,
        include=(r"mlp\.", "q_proj"),
        exclude=("up_proj$",),
        skip_layers=(0, -1),
        own={r"layers\.1\.mlp\.down": "2:4", "down": 0.25, "gate": 0},
    )
    expected = {
        (0, "m.layers.0.mlp.gate_proj"): None,  # skipped
        (1, "m.layers.1.mlp.down_proj"): NofM(2, 4),  # the first that is found
        (2, "m.layers.2.mlp.down_proj"): Unstructured(0.25),
        (2, "m.layers.2.mlp.gate_proj"): None,  # 0
        (2, "m.layers.2.mlp.up_proj"): None,  # excluded
        (2, "m.layers.2.self_attn.q_proj"): HALF,
        (2, "m.layers.2.self_attn.k_proj"): None,  # not included
        (3, "m.layers.3.self_attn.q_proj"): None,  # the last
    }
    assert {key: targets.of(*key, layers=4) for key in expected} == expected
    numbered = Targets(HALF, own={"1": 0.25, "-1": 0})
    assert [numbered.of(index, f"m.layers.{index}.up", 12) for index in (0, 1, 10, 11)] == [
        HALF, Unstructured(0.25), HALF, None,
    ]  # fmt: skip
    assert numbered.of(12, "head", 12) == HALF
    allocated = Targets(HALF, own={"down": 0.25}, allocated={"up": 0.6})
    assert allocated.of(1, "up", 2) == Unstructured(0.6, over_linear=True)
    assert allocated.of(2, "up", 2) == HALF  # the head is given none
    assert allocated.of(1, "down", 2) == Unstructured(0.25)


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
def test_a_budget_is_met_to_a_weight_of_each_linear(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]
) -> None:
    report = run(model, tmp_path / "out", tokens, sparsity=0.613, **settings)
    own = settings.get("sparsities", {})
    assert isinstance(own, dict)
    linears = {f"layers.{layer.index}.{one.name}": one for layer in report.layers for one in layer.linears}
    wanted = {
        name: next((value for part, value in own.items() if part in name), 0.613) * one.shape[0] * one.shape[1]
        for name, one in linears.items()
    }
    by_loss = "best" in settings.values() or "loss" in settings.values()
    if own or "uniform" in settings.values():
        assert all(abs(one.pruned - wanted[name]) <= 0.5 for name, one in linears.items())
    assert abs(report.pruned - sum(wanted.values())) <= (1 if by_loss else len(linears))


def test_the_published_methods_meet_it_in_each_row(tmp_path: Path, model: Path, tokens: Path) -> None:
    report = run(model, tmp_path / "out", tokens, sparsity=0.613, preset="paper")
    assert all(one.pruned == int(0.613 * one.shape[1]) * one.shape[0] for one in report.linears)


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
def test_what_is_left_out_keeps_its_bits(
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
            own = linear.name.split(".")[1].removesuffix("_proj")
            assert (linear.pruned > 0) == ((layer.index, own) in layers)
            assert linear.zeros == int(
                (written[f"model.layers.{layer.index}.{linear.name}.weight"] == 0).count_nonzero()
            )


def test_a_block_alone_is_pruned_as_among_others(tmp_path: Path, model: Path, tokens: Path) -> None:
    """The first layer's MLP depends on no later choice."""
    alone = run(model, tmp_path / "alone", tokens, include=(r"layers\.0\.mlp",), rebuild_ratio=0.5)
    others = run(model, tmp_path / "others", tokens, exclude=("self_attn",), rebuild_ratio=0.5)
    assert alone.pruned < others.pruned
    for name, weight in read_folder(tmp_path / "alone").items():
        if ".layers.0." in name:
            assert torch.equal(weight, read_folder(tmp_path / "others")[name])


def test_sparsities_of_linears_own(tmp_path: Path, model: Path, tokens: Path) -> None:
    path = tmp_path / "sparsities.yaml"
    path.write_text('# by hand\n"mlp\\\\.down_proj$": 0.25\nv_proj: 0\n"layers\\\\.2\\\\.": 2:4\n')
    told: list[str] = []
    progress = Silent()
    progress.warn = told.append  # type: ignore[method-assign]
    settings = {"dtype": "float32", "sparsity": 0.5, "sparsities": path, "rebuild_ratio": 0.5}
    report = prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings), progress)
    assert not told  # the sparsity over all is what was asked for, taken together
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
    # The file's content is what a run depends on, not its name.
    assert report.settings["sparsities"] == {"mlp\\.down_proj$": 0.25, "v_proj": 0, "layers\\.2\\.": "2:4"}


def test_bad_input(tmp_path: Path, model: Path, tokens: Path) -> None:
    good = {"model": model, "output": tmp_path / "out", "calibration": tokens}
    for settings, words in (
        ({"include": ("q[",)}, "'q\\[' is not a regular expression"),
        ({"exclude": ("(",)}, "is not a regular expression"),
        ({"sparsities": {"q_proj": 1.5}}, "sparsity 1.5 is not between 0 and 1"),
        ({"sparsities": {"q_proj": "4:2"}}, "must keep at least 1"),
        ({"sparsities": {"q_proj": True}}, "q_proj: True is neither a sparsity"),
        ({"sparsities": {0: 1.5}}, "0: sparsity 1.5 is not between 0 and 1"),
        ({"sparsities": tmp_path / "none.yaml"}, "cannot be read"),
        ({"skip_layers": ("x",)}, "skip_layers"),
    ):
        with pytest.raises(SettingsError, match=words):
            PruneConfig(**good, **settings)
    for content in ("- a\n- b\n", "just words", "{", "\x00"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(SettingsError, match=r"bad\.yaml (cannot be read|is not a mapping)"):
            PruneConfig(**good, sparsities=tmp_path / "bad.yaml")
    for settings, words in (
        ({"include": ("c_attn",)}, "include: 'c_attn' is found in no linear's name"),
        ({"exclude": ("c_attn",)}, "exclude: 'c_attn' is found in no linear's name"),
        ({"sparsities": {"c_attn": 0.5}}, "sparsities: 'c_attn' is found in no linear's name"),
        ({"sparsities": {"3": 0.5}}, "sparsities: there is no decoder layer 3"),
        ({"sparsities": {"0": 0.5, "-3": 0.2}}, "sparsities: two numbers are of one layer"),
        ({"skip_layers": (3,)}, "there is no decoder layer 3"),
        ({"skip_layers": (0, 1, -1)}, "leave nothing to prune"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            prune(PruneConfig(**good, **settings))
        assert caught.value.hint
    with pytest.raises(
        ModelError, match=r"pattern 2:5 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q"
    ):
        prune(PruneConfig(**good, sparsities={"q_proj": "2:5"}))
    assert not list(tmp_path.glob("out*"))


TAILS = [
    {"initial": "magnitude", "rebuild_ratio": 1},
    {"initial": "wanda", "granularity": "block", "rebuild_ratio": 1},
    {"initial": "sparsegpt", "granularity": "linear", "rebuild_ratio": 0.5},
    {"initial": "sparsegpt", "keep_updates": True, "rebuild": False},
    {"initial": "dsnot"},
    {"initial": "alps", "rebuild_ratio": 0.5},
    {"preset": "mask"},
    {"preset": "best"},
]


@pytest.mark.parametrize("settings", TAILS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_dense_tail(tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]) -> None:
    """Rows of 32 and 64 inputs in groups of 9: tails of 5 and 1."""
    report = run(model, tmp_path / "out", tokens, pattern="4:9", allow_dense_tail=True, **settings)
    changes = settings.get("preset") == "best" or settings.get("keep_updates")
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    for layer in report.layers:
        for linear in layer.linears:
            name = f"model.layers.{layer.index}.{linear.name}.weight"
            rows, columns = dense[name].shape
            groups = written[name][:, : columns // 9 * 9].reshape(rows, -1, 9)
            assert (groups.count_nonzero(dim=2) == 4).all()
            tail = written[name][:, columns // 9 * 9 :]
            assert tail.all() if changes else torch.equal(tail, dense[name][:, columns // 9 * 9 :])
            assert (linear.pruned, linear.pattern) == (5 * rows * (columns // 9), "4:9")
    assert "after the last whole group of M dense" in report.changes
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems
    if not changes:
        again = rebuild(
            RebuildConfig(
                dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens, rebuild_ratio=1
            )
        )
        assert again.swapped > 0
        assert again.sparsity == report.sparsity


@pytest.mark.parametrize("with_record", [True, False])
def test_rebuild_keeps_each_linears_pattern_with_tails(
    tmp_path: Path, model: Path, tokens: Path, with_record: bool
) -> None:
    model = make_model(tmp_path / "wide", "llama", hidden_size=36, intermediate_size=70, num_attention_heads=6)
    own = {"q_proj": "2:4", "mlp": "4:8", "k_proj": 0.5}
    run(
        model, tmp_path / "out", tokens, sparsities=own, exclude=("v_proj",), allow_dense_tail=True, initial="magnitude"
    )
    if not with_record:
        (tmp_path / "out" / "barber.json").unlink()
    rebuilt = rebuild(
        RebuildConfig(
            dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens, rebuild_ratio=1
        )
    )
    written = read_folder(tmp_path / "again")
    for layer in rebuilt.layers:
        for linear in layer.linears:
            kind = linear.name.split(".")
            expected = {"q_proj": "2:4", "mlp": "4:8"}.get(kind[0]) or {"q_proj": "2:4"}.get(kind[1])
            assert linear.pattern == expected, linear.name
            if expected:
                assert linear.grown > 0
                assert holds(parse_pattern(expected), written[f"model.layers.{layer.index}.{linear.name}.weight"] != 0)


def test_groups_longer_than_a_row(tmp_path: Path, model: Path, tokens: Path) -> None:
    with pytest.raises(ModelError, match="pattern 20:40 is longer than the 32 inputs of"):
        run(model, tmp_path / "out", tokens, pattern="20:40", allow_dense_tail=True)


def test_parse() -> None:
    assert parse_target(0.5) == HALF
    assert parse_target(0) is None
    assert parse_target("2:4") == NofM(2, 4)
    assert read_targets({"a": 1}) == {"a": 1}


def test_a_file_that_says_two_things_of_one_linear(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("q_proj: 0.5\n1: 0.25\nk_proj: 2:4\n")
    assert read_targets(tmp_path / "own.yaml") == {"q_proj": 0.5, "1": 0.25, "k_proj": "2:4"}
    (tmp_path / "own.yaml").write_text("q_proj: 0.5\nq_proj: 0.2\n")
    with pytest.raises(ValueError, match="q_proj is there twice"):
        read_targets(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    "settings", [{"preset": "best"}, {"pattern": "2:4", "preset": "mask"}, {"initial": "sparsegpt"}]
)
def test_weights_that_are_kept_transposed(tmp_path: Path, tokens: Path, settings: dict[str, object]) -> None:
    """GPT-2 keeps its weights as (in, out): shapes and N:M are those of (out, in), in the record and for inspect."""
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


def test_the_example_of_an_error_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(EXAMPLE + "\n")
    assert read_targets(tmp_path / "example.yaml") == {r"mlp\.down_proj$": 0.4}


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


def test_rebuild_leaves_alone_what_is_not_pruned(tmp_path: Path, model: Path, tokens: Path) -> None:
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


def test_a_pattern_with_layers_left_out_is_that_pattern(tmp_path: Path, model: Path, tokens: Path) -> None:
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
def test_layers_without_linears_of_the_given_blocks(tmp_path: Path, tokens: Path, preset: str) -> None:
    """Of Qwen3-MoE's layers the first has a dense MLP, and no experts."""
    model = make_model(tmp_path / "mixture", "qwen3_moe")
    (tmp_path / "blocks.yaml").write_text("experts: {output: mlp, linears: ['mlp.experts.*.down_proj']}")
    report = run(model, tmp_path / "out", tokens, blocks=tmp_path / "blocks.yaml", preset=preset)
    assert [len(layer.linears) for layer in report.layers] == [0, 4]
    assert report.pruned == report.weights // 2
    found = forecast(PlanConfig(model=str(model), blocks=tmp_path / "blocks.yaml", flops=1e12, seqlen=16))
    assert found.weights == report.weights


def test_templates_of_a_folder_travel(tmp_path: Path, tokens: Path, model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    run(model, tmp_path / "out", tokens, preset="paper")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems == ()
    (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")
    (problem,) = inspect(InspectConfig(model=tmp_path / "out")).problems
    assert problem.startswith("additional_chat_templates/tool_use.jinja has changed")


def test_files_that_yaml_cannot_read_safely(tmp_path: Path) -> None:
    good = {"model": "m", "output": tmp_path / "out"}
    path = tmp_path / "bad.yaml"
    bomb = "a: &a [x, x]\n" + "".join(
        f"{two}: &{two} [*{one}, *{one}]\n" for one, two in zip("abcd", "bcde", strict=True)
    )
    for content, words in (
        ("[" * 5000, "bad.yaml cannot be read: it is nested too deeply"),
        ('a: "\\ud800"', "bad.yaml|sparsities"),
        (bomb, "a is given a list or a mapping, not a sparsity"),
        ("'a{99999999999999}': 0.5", "is not a regular expression"),
        (f"{'9' * 5000}: 1.5", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match=words):
            PruneConfig(**good, sparsities=path)
    with pytest.raises(SettingsError, match="cannot be read"):
        PruneConfig(**good, sparsities="~nobody-here/x.yaml")
