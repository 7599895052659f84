"""Whole runs of `prune` on tiny models: what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, PruneConfig, RunReport, inspect, prune
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.pattern import Unstructured, parse_pattern
from llm_barber.record.card import model_card
from llm_barber.run.dry_run import dry_run
from llm_barber.runtime.load import load
from llm_barber.settings.presets import Initial
from tests.conftest import FAMILIES, Listener, bits, load_model, make_model, read_folder, save_tokens
from tests.helpers.prune_runs import is_linear, run
from tests.helpers.shards import split_in_two_shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("initial", Initial)
def test_kept_weights_keep_their_bits(tmp_path: Path, tokens: Path, initial: str, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype)
    report = run(model, tmp_path / "out", tokens, initial=initial, rebuild_ratio=0.5, sparsity=0.6)
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    assert dense.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == dense[name].dtype
        pruned = tensor == 0
        if is_linear(name):
            assert (bits(tensor)[pruned] == 0).all()  # +0.0
        else:
            assert not pruned.all() or (dense[name] == 0).all()
        kept = ~pruned if is_linear(name) else torch.ones_like(pruned)
        assert torch.equal(bits(tensor)[kept], bits(dense[name])[kept])
    for layer in report.layers:
        for linear in layer.linears:
            assert linear.pruned == linear.zeros
        # Linears of a block compete: one of them may only lose.
        assert all(any(linear.grown for linear in block.linears) for block in layer.blocks) or initial != "magnitude"
    exact = 0.59375 if initial in ("wanda", "dsnot") else 0.6  # floor(0.6 · 32) = 19 of a row's 32 …
    assert report.sparsity == pytest.approx(exact, abs=0.005)
    assert report.sparsity <= 0.6


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
def test_dsnot_leaves_mlps_to_wanda(tmp_path: Path, llama: Path, tokens: Path, amount: dict[str, Any]) -> None:
    weights = {}
    for initial in ("wanda", "dsnot"):
        run(llama, tmp_path / initial, tokens, initial=initial, rebuild=False, **amount)
        weights[initial] = read_folder(tmp_path / initial)
    same = {
        name: torch.equal(weights["dsnot"][name], tensor)
        for name, tensor in weights["wanda"].items()
        if is_linear(name) and ".layers.0." in name  # later layers get other inputs
    }
    assert len(same) == 7
    assert all(equal == (".mlp." in name) for name, equal in same.items())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32"])
@pytest.mark.parametrize(
    ("initial", "granularity"),
    [(initial, "block") for initial in Initial] + [("wanda", "output")],
)
def test_patterns_hold_exactly(
    tmp_path: Path, llama: Path, tokens: Path, initial: str, pattern: str, granularity: str
) -> None:
    report = run(
        llama, tmp_path / "out", tokens, initial=initial, pattern=pattern, rebuild_ratio=1.0, granularity=granularity
    )
    target = parse_pattern(pattern)
    for name, tensor in read_folder(tmp_path / "out").items():
        if is_linear(name):
            assert holds(target, tensor != 0)
            assert (tensor != 0).sum() == tensor.numel() * target.kept // target.of
    assert report.swapped > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_everywhere_with_the_same_logits(tmp_path: Path, tokens: Path, family: str) -> None:
    model = make_model(tmp_path / "dense", family)
    run(model, tmp_path / "out", tokens, rebuild_ratio=0.5)
    ids = load_file(tokens)["input_ids"]
    in_memory, loaded = load_model(model), load_model(tmp_path / "out")
    parameters = dict(loaded.named_parameters())  # of experts, all in one
    ours = dict(load(tmp_path / "out").named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in parameters.items())
    with torch.no_grad():
        for name, parameter in in_memory.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameters[name] != 0)
        logits = loaded(ids).logits
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, in_memory(ids).logits)
    assert loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_sharded_and_unprefixed_checkpoints_give_the_same_weights(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "opt")
    run(model, tmp_path / "one", tokens, rebuild_ratio=0.5)
    split_in_two_shards(model)
    run(model, tmp_path / "two", tokens, rebuild_ratio=0.5)
    tensors = read_folder(model)
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    run(model, tmp_path / "three", tokens, rebuild_ratio=0.5)
    plain, sharded, unprefixed = (read_folder(tmp_path / name) for name in ("one", "two", "three"))
    assert plain.keys() == sharded.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, sharded[name])
        assert torch.equal(tensor, unprefixed[name.removeprefix("model.")])


def test_same_settings_same_bytes_and_batch_size_does_not_matter(tmp_path: Path, llama: Path) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", sequences=7)
    reports = [
        run(llama, tmp_path / str(number), tokens, rebuild_ratio=0.5, batch_size=batch, dtype="float32")
        for number, batch in enumerate([7, 7, 1, 3])
    ]
    assert all(report.files == reports[0].files for report in reports)
    assert reports[0].swapped > 100


def test_the_record_is_complete(tmp_path: Path, llama: Path, tokens: Path) -> None:
    report = run(llama, tmp_path / "out", tokens, rebuild_ratio=0.5, granularity="block", seed=3)
    record = json.loads((tmp_path / "out" / "barber.json").read_text())
    assert record["settings"]["seed"] == 3
    assert record["calibration"] == {
        "source": str(tokens),
        "sequences": 4,
        "tokens": 24,
        "first_token": None,  # random windows begin with this and that
        "sha256": report.calibration.sha256,
    }
    assert set(record["versions"]) >= {"torch", "transformers", "llm-barber", "python"}
    assert len(record["layers"]) == 2
    for layer in record["layers"]:
        assert [block["name"] for block in layer["blocks"]] == ["attention", "mlp"]
        for block in layer["blocks"]:
            assert 0 < block["error_after"] < block["error_before"]
            assert sum(linear["grown"] - linear["dropped"] for linear in block["linears"]) == 0
            assert sum(linear["beneficial_pairs"] for linear in block["linears"]) // 2 == sum(
                linear["swaps"] for linear in block["linears"]
            )
    assert RunReport.model_validate(record) == report
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv preprint arXiv:2408.10631" in card
    assert "| self_attn.q_proj | 2,048 |" in card
    for name, base in (
        ("org/name@v1", "org/name"),
        ("org/name", "org/name"),
        ("gone/model/deep", ""),
        (str(llama), ""),
    ):
        lines = model_card(report.model_copy(update={"model": name})).splitlines()
        assert [line for line in lines if line.startswith("base_model")] == [f"base_model: {base}"] * bool(base)


def test_error_before_is_of_the_initial_mask(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """A ratio that swaps nothing leaves the error as it was: before and after are the same measurement."""
    report = run(llama, tmp_path / "out", tokens, rebuild_ratio=1e-9, dtype="float32")
    assert report.swapped == 0
    for layer in report.layers:
        for block in layer.blocks:
            assert block.error_after == pytest.approx(block.error_before, rel=1e-5)


def test_keep_updates_keeps_sparsegpts_weights(tmp_path: Path, llama: Path, tokens: Path) -> None:
    dense = read_folder(llama)
    run(llama, tmp_path / "plain", tokens, initial="sparsegpt", rebuild=False)
    run(llama, tmp_path / "updated", tokens, initial="sparsegpt", rebuild=False, keep_updates=True)
    report = run(llama, tmp_path / "rebuilt", tokens, initial="sparsegpt", rebuild_ratio=0.5, keep_updates=True)
    plain, updated, rebuilt = (read_folder(tmp_path / name) for name in ("plain", "updated", "rebuilt"))
    for name in filter(is_linear, dense):
        assert torch.equal(plain[name] != 0, updated[name] != 0)
        assert (updated[name] != dense[name]).float().mean() > 0.9
    name = "model.layers.0.self_attn.q_proj.weight"
    grown = (rebuilt[name] != 0) & (plain[name] == 0)
    stayed = (rebuilt[name] != 0) & (plain[name] != 0)
    assert grown.any()
    assert torch.equal(rebuilt[name][grown], dense[name][grown])
    assert torch.equal(rebuilt[name][stayed], updated[name][stayed])
    assert report.sparsity == 0.5
    assert inspect(InspectConfig(model=str(tmp_path / "rebuilt"), dense=str(llama))).problems == ()


def test_prune_never_overshoots_on_tied_and_zero_weights(tmp_path: Path, llama: Path, tokens: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    for name in filter(is_linear, tensors):
        tensors[name] = (tensors[name] * 8).round() / 8  # a dozen distinct values, many zeros
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    for initial in ("magnitude", "wanda", "sparsegpt"):
        report = run(llama, tmp_path / initial, tokens, initial=initial, rebuild_ratio=0.5)
        assert all(linear.pruned == linear.weights // 2 for linear in report.linears) or initial == "magnitude"
        assert report.sparsity == 0.5
        assert inspect(InspectConfig(model=str(tmp_path / initial), dense=str(llama))).problems == ()


def test_half_precision_is_judged_by_its_values_not_by_their_sum(tmp_path: Path, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 10
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    tokens = save_tokens(tmp_path / "many.safetensors", sequences=64, tokens=64)
    report = run(llama, tmp_path / "out", tokens, dtype="float16", preset="paper")
    assert report.sparsity == 0.5


def test_a_missed_sparsity_is_said(tmp_path: Path, llama: Path, tokens: Path) -> None:
    told = Listener()
    amount = {"sparsity": 0.999, "preset": "paper", "report": False}
    prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, **amount), told)
    nothing_swapped, missed = told.warnings
    assert "the rebuild swapped nothing" in nothing_swapped
    assert "sparsity is 0.97" in missed


def test_a_run_that_prunes_nothing_has_no_mixed_patterns(tmp_path: Path, llama: Path, tokens: Path) -> None:
    report = run(llama, tmp_path / "out", tokens, sparsity=0.001, initial="wanda", rebuild=False)
    assert (report.pruned, report.pattern) == (0, "unstructured")


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, True), ({"initial": "wanda"}, False), ({"preset": "mask"}, False), ({"allocation": "loss"}, False)],
)
def test_a_rebuild_that_is_switched_off_means_another_preset(
    tmp_path: Path, llama: Path, tokens: Path, settings: dict[str, Any], said: bool
) -> None:
    told = Listener()
    prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, rebuild=False, **settings), told)
    assert any(text.startswith("--no-rebuild without --preset means --preset paper") for text in told.warnings) is said


def test_a_model_that_was_pruned_before_is_said(tmp_path: Path, llama: Path, tokens: Path) -> None:
    settings = {"calibration": tokens, "initial": "magnitude", "rebuild": False, "report": False}
    for model, output, warned in ((llama, tmp_path / "once", False), (tmp_path / "once", tmp_path / "twice", True)):
        told = Listener()
        prune(PruneConfig(model=model, output=output, **settings), told)
        assert any("was pruned before" in warning for warning in told.warnings) is warned


def test_default_granularity_and_ratio_are_the_released_ones(tmp_path: Path, llama: Path, tokens: Path) -> None:
    defaults = {}
    for initial in ("magnitude", "wanda", "sparsegpt"):
        report = run(llama, tmp_path / initial, tokens, initial=initial)
        defaults[initial] = (report.granularity, report.rebuild_ratio)
    assert defaults == {"magnitude": ("block", 0.1), "wanda": ("output", 0.01), "sparsegpt": ("linear", 0.1)}
    assert run(llama, tmp_path / "nm", tokens, initial="magnitude", pattern="2:4").granularity == "output"


def test_magnitude_by_output_row(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(
        llama, tmp_path / "out", tokens, initial="magnitude", initial_granularity="output", rebuild=False, sparsity=0.25
    )
    for name, tensor in read_folder(tmp_path / "out").items():
        if is_linear(name):
            assert ((tensor == 0).sum(1) == Unstructured(0.25).pruned(tensor.shape[1])).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"preset": "mask", "refine": "tune", "allocation": "loss", "target_mix": 0.5, "guard": 0.03125}),
        ({"pattern": "2:4"}, {"preset": "mask", "allocation": "uniform", "target_mix": 0.75}),
        ({"preset": "best"}, {"preset": "best", "reconstruct": "tune", "tune_passes": 6, "tune_windows": 1}),
        ({"initial": "magnitude"}, {"preset": "paper", "granularity": "block", "rebuild_ratio": 0.1}),
        ({"rebuild": False}, {"preset": None, "rebuild": False, "refine": "none", "initial": "wanda"}),
        (
            {"refine": "swaps", "pattern": "2:4"},
            {"preset": None, "swaps": 400, "tune_passes": None, "tune_windows": None, "guard": 0.125},
        ),
    ],
)
def test_the_record_says_what_was_left_to_presets(
    tmp_path: Path, llama: Path, tokens: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    report = prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, report=False, **settings))
    assert expected.items() <= json.loads(report.to_json())["resolved"].items()
    assert report.resolved["samples"] == report.calibration.sequences
    named = f"preset {expected['preset']}; " if expected["preset"] else ""
    assert f"; {named}" in (tmp_path / "out" / "README.md").read_text()
    assert ("preset" in report.changes) == bool(named)


def test_what_held_out_windows_say_is_told(tmp_path: Path, llama: Path, tokens: Path) -> None:
    report = run(llama, tmp_path / "out", tokens)
    nearer = [[error for error in layer.held_out if error < layer.held_out[0]] for layer in report.layers]
    shares = [
        1 - errors[-1] / layer.held_out[0] if errors else 0.0
        for errors, layer in zip(nearer, report.layers, strict=True)
    ]
    kept = sum(map(bool, nearer))
    assert report.tuning is not None
    assert f"−{sum(shares) / 2:.0%} in the mean, {kept} of 2 layers are kept as tuned" in report.tuning
    assert ("blocks left as they were" in report.tuning) == bool(report.rejected)
    assert report.tuning in (tmp_path / "out" / "README.md").read_text()
    assert run(llama, tmp_path / "p", tokens, preset="paper").tuning is None


@pytest.mark.parametrize(
    ("windows", "settings", "told"),
    [
        (9, {}, "0.99 numbers for each of its weights"),  # 9 × 32 tokens, 32 numbers each, for 9,280 weights
        (10, {}, None),
        (9, {"initial": "wanda"}, None),  # which is not tuned
    ],
)
def test_little_text_for_each_weight_is_told(
    tmp_path: Path, llama: Path, windows: int, settings: dict[str, Any], told: str | None
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=windows, tokens=32)
    listener = Listener()
    dry_run(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, **settings), listener)
    warnings = [warning for warning in listener.warnings if "is little for this model" in warning]
    assert len(warnings) == (told is not None)
    assert all(
        told in warning and f"{windows} × 32 tokens" in warning and "more text" in warning for warning in warnings
    )
