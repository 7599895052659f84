"""Whole runs with tuning: families, masks of other tools, zeros of the dense model, idle experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, RebuildConfig, inspect, rebuild
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.errors import SettingsError
from llm_barber.masking.rebuild import Rebuilt
from llm_barber.method.outcome import BlockOutcome
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.tune import Tuned
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.tuned_runs import masks, run


@pytest.mark.parametrize(("family", "few_tokens"), [("qwen3_moe", 110), ("gpt_oss", 90), ("gpt2", 0), ("lfm2", 0)])
def test_families(tmp_path: Path, family: str, few_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, weights as (in, out), layers without attention; experts with few tokens keep their masks."""
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", few_tokens)
    model, tokens = make_model(tmp_path / "dense", family), save_tokens(tmp_path / "tokens.safetensors", sequences=8)
    plain = run(model, tmp_path / "plain", tokens, preset="mask", refine="none", pattern="2:4")
    report = run(model, tmp_path / "out", tokens, preset="mask", reconstruct="none", pattern="2:4")
    assert report.swapped > 0
    assert report.sparsity == plain.sparsity
    few = [linear for linear in report.linears if linear.few_tokens]
    assert all(linear.grown == 0 for linear in few)
    assert bool(few) is bool(few_tokens)
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize("granularity", ["output", "block"])
@pytest.mark.parametrize("refine", ["none", "swaps", "tune"])
def test_swaps_are_counted_from_the_initial_masks(
    tmp_path: Path, model: Path, tokens: Path, refine: str, granularity: str
) -> None:
    """A weight that the rebuild grows and a later step drops again is not counted as swapped."""
    run(model, tmp_path / "first", tokens, initial="magnitude", rebuild=False)
    settings = {"rebuild": True, "granularity": granularity, "rebuild_ratio": 1.0, "refine": refine}
    report = run(model, tmp_path / "out", tokens, initial="magnitude", **settings)
    before, after = read_folder(tmp_path / "first"), read_folder(tmp_path / "out")
    for layer in report.layers:
        for linear in layer.linears:
            name = f"model.layers.{layer.index}.{linear.name}.weight"
            grown, dropped = (before[name] == 0) & (after[name] != 0), (before[name] != 0) & (after[name] == 0)
            assert (linear.grown, linear.dropped) == (int(grown.sum()), int(dropped.sum()))
    assert report.swapped > 0


@pytest.mark.parametrize("reject", ["both", "linears", "layer"])
def test_a_block_is_rejected_if_both_of_its_refinements_are(reject: str) -> None:
    keep = torch.ones(2, 4, dtype=torch.bool)
    linear = PrunedLinear(keep, keep.float(), keep.float(), None)
    outcome = BlockOutcome({"up": linear}, {"up": Rebuilt(keep, 0, 0, 0)}, rejected=reject != "layer")
    tuned = Tuned({"up": linear}, (1.0, 0.5 if reject == "linears" else 1.0))
    assert outcome.tuned(tuned, {"up": keep}, after_linears=True).rejected == (reject == "both")
    assert outcome.tuned(tuned, {"up": keep}, after_linears=False).rejected == tuned.rejected


def test_rebuild_by_a_preset(tmp_path: Path, model: Path, tokens: Path) -> None:
    """The mask of another tool is tuned, without the published rebuild."""
    run(model, tmp_path / "pruned", tokens, initial="wanda", pattern="2:4", rebuild=False)
    (tmp_path / "pruned" / "barber.json").unlink()
    settings = {"dense": model, "pruned": tmp_path / "pruned", "calibration": tokens, "dtype": "float32"}
    report = rebuild(RebuildConfig(output=tmp_path / "out", preset="mask", **settings))
    assert (report.granularity, report.pattern, report.kept_weights) == (None, "2:4", "dense")
    assert report.swapped > 0
    assert sum(linear.beneficial_pairs for linear in report.linears) == 0
    with pytest.raises(SettingsError, match="leave nothing to do"):
        RebuildConfig(output=tmp_path / "other", rebuild=False, **settings)


def test_the_mask_of_another_tool(tmp_path: Path, model: Path, tokens: Path) -> None:
    """`rebuild --refine tune`: weights that are zero in the dense model stay in the mask."""
    run(model, tmp_path / "pruned", tokens, initial="magnitude", sparsity=0.5)
    settings = {"dense": model, "pruned": tmp_path / "pruned", "calibration": tokens, "dtype": "float32"}
    plain = rebuild(RebuildConfig(output=tmp_path / "plain", **settings))
    report = rebuild(RebuildConfig(output=tmp_path / "out", refine="tune", **settings))
    assert report.swapped > plain.swapped
    before, after = masks(tmp_path / "plain"), masks(tmp_path / "out")
    assert all(torch.equal(before[name].sum(1), after[name].sum(1)) for name in before if "layers.0" in name)
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4"])
@pytest.mark.parametrize(
    "settings", [{"preset": "mask"}, {"preset": "best"}, {"reconstruct": "least-squares"}], ids=str
)
def test_zeros_of_the_dense_model(
    tmp_path: Path, model: Path, tokens: Path, pattern: str | None, settings: dict[str, Any]
) -> None:
    """Dense zeros count as kept and stay zero, and N:M and the number of zeros do not change."""
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if "_proj" in name:
            weight[torch.rand(weight.shape, generator=generator) < 0.05] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    target = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    run(model, tmp_path / "pruned", tokens, initial="wanda", rebuild=False, **target)
    (tmp_path / "pruned" / "barber.json").unlink()
    rebuilt = RebuildConfig(
        dense=model, pruned=tmp_path / "pruned", output=tmp_path / "out", calibration=tokens, dtype="float32", guard=0,
        granularity="output", **settings,
    )  # fmt: skip
    rebuild(rebuilt)
    before, after = masks(tmp_path / "pruned"), masks(tmp_path / "out")
    for name, keep in before.items():
        assert int(keep.sum()) == int(after[name].sum())
        assert not (after[name] & (tensors[name] == 0)).any()
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize("preset", ["mask", "best"])
def test_a_tail_that_another_tool_pruned_stays_pruned(tmp_path: Path, model: Path, tokens: Path, preset: str) -> None:
    """The tail is the weights of a row after its last whole group of M."""
    run(model, tmp_path / "pruned", tokens, pattern="3:5", allow_dense_tail=True, initial="wanda", rebuild=False)
    (tmp_path / "pruned" / RECORD_NAME).unlink()
    for path in (tmp_path / "pruned").glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if "_proj" in name:
                weight[:, weight.shape[1] // 5 * 5 :: 2] = 0
        save_file(tensors, path, {"format": "pt"})
    paths = {"dense": model, "pruned": tmp_path / "pruned", "output": tmp_path / "out", "calibration": tokens}
    rebuild(RebuildConfig(pattern="3:5", preset=preset, guard=0, dtype="float32", **paths))
    before, after = masks(tmp_path / "pruned"), masks(tmp_path / "out")
    for name in before:
        tail = before[name].shape[1] // 5 * 5
        assert not before[name][:, tail:].all()
        assert torch.equal(before[name][:, tail:], after[name][:, tail:])
        assert torch.equal(before[name].sum(1), after[name].sum(1))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("settings", [{"initial": "wanda"}, {"initial": "magnitude"}, {"preset": "best"}], ids=str)
def test_layers_in_which_all_experts_are_idle(
    tmp_path: Path, tokens: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 10**6)
    model = make_model(tmp_path / "dense", "mixtral")
    report = run(
        model, tmp_path / "out", tokens, **{"rebuild": False, "refine": "tune", "include": ("experts",), **settings}
    )
    assert report.swapped == 0
    assert all(linear.few_tokens for linear in report.linears if linear.pruned)
    written, dense = read_folder(tmp_path / "out"), read_folder(model)
    assert all(((weight == dense[name]) | (weight == 0)).all() for name, weight in written.items())
