"""Refining in a streamed run equals refining on whole models in memory, with plain hooks."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, RunReport, inspect, prune
from llm_barber.errors import SettingsError
from llm_barber.masking.gram import TargetMoments
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.least_squares import least_squares
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.masking.swaps import swap_pairs
from llm_barber.method import refine
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine_linear import UNGUARDED_DAMPING, UNGUARDED_STEPS, Objective, refine_linear
from llm_barber.settings.presets import Preset
from llm_barber.settings.refining import RefineSettings
from tests.conftest import make_model, read_folder, save_tokens
from tests.model.reference import captured, first_call

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
)  # fmt: skip


@torch.no_grad()
def refine_in_memory(folder: Path, tokens: Tensor, pattern: Unstructured | NofM, mix: float, solve: bool) -> dict:
    """Wanda, then 5 swaps a row and least squares, layer by layer; weights by name."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = copy.deepcopy(dense)
    result = {}
    for index in range(len(sparse.model.layers)):
        layer, other = sparse.model.layers[index], dense.model.layers[index]
        calls = [first_call(sparse, sparse.model.layers, index, sequence[None]) for sequence in tokens]
        other_calls = [first_call(dense, dense.model.layers, index, sequence[None]) for sequence in tokens]
        keep = {}
        for name in sum(GROUPS, ()):
            inputs = [captured(layer, name, *call)[0] for call in calls]
            squares = sum(tensor.square().flatten(0, -2).sum(0) for tensor in inputs) / len(inputs)
            keep[name] = initial_mask(wanda(layer.get_submodule(name).weight, squares), pattern, Granularity.OUTPUT)
        for name in keep:
            layer.get_submodule(name).weight[~keep[name]] = 0
        for group in GROUPS:
            ours = torch.cat([captured(layer, group[0], *call)[0].flatten(0, -2) for call in calls])
            its = torch.cat([captured(other, group[0], *call)[0].flatten(0, -2) for call in other_calls])
            gram, difference = ours.t() @ ours / len(ours), (ours - its).t() @ ours / len(ours)
            for name in group:
                weight = other.get_submodule(name).weight
                linear = mix * weight @ difference
                mask, _ = swap_pairs(
                    keep[name], weight, gram, 5, linear, pattern if isinstance(pattern, NofM) else None
                )
                values = weight * mask
                if solve:
                    values = least_squares(mask, weight, gram, linear, UNGUARDED_STEPS, UNGUARDED_DAMPING)
                layer.get_submodule(name).weight.copy_(values)
                result[f"model.layers.{index}.{name}.weight"] = values
    return result


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize(("mix", "solve"), [(0.0, False), (0.5, False), (0.5, True)])
def test_streamed_equals_in_memory(tmp_path: Path, pattern: Unstructured | NofM, mix: float, solve: bool) -> None:
    folder = make_model(tmp_path / "dense", "llama")
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    report = prune(
        PruneConfig(
            model=folder, output=tmp_path / "out", pattern="2:4" if isinstance(pattern, NofM) else None, rebuild=False,
            refine="swaps", swaps=5, target_mix=mix, guard=0,
            reconstruct="least-squares" if solve else None, calibration=tokens, dtype="float32", batch_size=2,
            report=False,
        )
    )  # fmt: skip
    expected = refine_in_memory(folder, load_file(tokens)["input_ids"], pattern, mix, solve)
    written = read_folder(tmp_path / "out")
    assert report.swapped > 0
    assert len(expected) == 14
    for name, values in expected.items():
        assert torch.equal(written[name] != 0, values != 0), name
        assert torch.allclose(written[name], values, rtol=1e-3, atol=1e-4), name


def correlated(seed: int) -> Tensor:
    """Inputs of a linear, (tokens, in)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(60, 16, generator=generator) @ torch.randn(16, 16, generator=generator)


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)], ids=str)
def test_held_out_windows_decide_row_by_row_and_about_damping(pattern: NofM | None) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(40, 16, generator=generator)
    keep = initial_mask(weight.abs(), pattern or Unstructured(0.5), Granularity.OUTPUT)
    pruned = PrunedLinear(keep, weight * keep, weight, pattern)
    ours, other = correlated(1), correlated(2)  # two texts that have nothing in common
    training, held_out = (Objective(inputs.t() @ inputs, None) for inputs in (ours, other))
    settings = RefineSettings(swaps=8, target_mix=0.0, solve=False, held_out=1)
    free = refine_linear(pruned, weight, training, None, settings)
    refined = refine_linear(pruned, weight, training, held_out, settings)
    before, after, without = (held_out.error(weight * linear.keep, weight) for linear in (pruned, refined, free))
    assert (after <= before).all()
    assert (after < without).any()  # some rows were stopped earlier
    assert (refined.keep & ~keep).any()
    assert torch.equal(refined.keep.sum(1), keep.sum(1))
    solved = refine_linear(pruned, weight, training, held_out, replace(settings, solve=True))
    assert held_out.error(solved.final, weight).sum() <= after.sum()
    alike = refine_linear(pruned, weight, training, training, replace(settings, solve=True))
    assert training.error(alike.final, weight).sum() < 0.5 * training.error(refined.final, weight).sum()


def test_an_expert_without_held_out_tokens_is_refined_without_them() -> None:
    """Where experts are computed together, zeros pad the inputs of those with fewer tokens: of this one all are."""
    moments = TargetMoments(4, torch.device("cpu"))
    assert Objective.of(moments, 0.5) is None
    moments.update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert Objective.of(moments, 0.5) is None
    moments.update(torch.eye(4)[None], torch.eye(4)[None])
    assert Objective.of(moments, 0.5) is not None


def test_values_of_unknown_held_out_error_are_not_kept() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    keep = initial_mask(weight.abs(), Unstructured(0.5), Granularity.OUTPUT)
    pruned, inputs = PrunedLinear(keep, weight * keep, weight, None), correlated(1)[:, :8]
    training, unknown = Objective(inputs.t() @ inputs, None), Objective(torch.full((8, 8), math.nan), None)
    settings = RefineSettings(swaps=0, target_mix=0.0, solve=True, held_out=1)
    assert torch.equal(refine_linear(pruned, weight, training, unknown, settings).final, weight * keep)


def run(folder: Path, out: Path, tokens: Path, **settings: Any) -> RunReport:
    config = {"dtype": "float32", "rebuild": False, "report": False, **settings}
    return prune(PruneConfig(model=folder, output=out, calibration=tokens, **config))


@pytest.mark.parametrize("distance", [2.0, math.nan])
def test_a_block_that_got_worse_on_held_out_windows_stays_as_it_was(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, distance: float
) -> None:
    run(llama, tmp_path / "plain", tokens)
    measure = refine.measure_candidates
    monkeypatch.setattr(refine, "measure_candidates", lambda *arguments: (measure(*arguments)[0], (1.0, distance)))
    report = run(llama, tmp_path / "refined", tokens, refine="swaps", reconstruct="least-squares")
    blocks = [block for layer in report.layers for block in layer.blocks]
    assert all(block.rejected for block in blocks)
    assert all(block.error_after == pytest.approx(block.error_before) for block in blocks)
    assert report.swapped == 0
    plain, refined = read_folder(tmp_path / "plain"), read_folder(tmp_path / "refined")
    assert all(torch.equal(plain[name], refined[name]) for name in plain)


@torch.no_grad()
def distances_in_memory(
    folder: Path, pruned: Path, texts: Tensor, index: int, output: str, candidates: list[dict[str, Tensor]], mix: float
) -> list[float]:
    """Squared distances of a block from its target, with each candidate's linears; means of each text, summed.

    All before the block is as in the pruned checkpoint. The target lies between the block's output with dense weights
    there and its output in the dense model, on that model's own activations.
    """
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, pruned)
    )
    layer, whole = sparse.model.layers[index], dense.model.layers[index]
    distances = [0.0] * len(candidates)
    for text in texts:
        call = first_call(sparse, sparse.model.layers, index, text[None])
        of_dense = captured(whole, output, *first_call(dense, dense.model.layers, index, text[None]))[1]

        def with_weights(weights: dict[str, Tensor], call: Any = call) -> Tensor:
            for name, values in weights.items():
                layer.get_submodule(name).weight.copy_(values)
            return captured(layer, output, *call)[1]

        on_sparse = with_weights({name: whole.get_submodule(name).weight for name in candidates[0]})
        target = (1 - mix) * on_sparse + mix * of_dense
        for place, weights in enumerate(candidates):
            distances[place] += (with_weights(weights) - target).square().mean().item()
    return distances


@pytest.mark.parametrize("mix", [0.75, 1.0])
def test_the_guard_measures_held_out_windows_against_the_mixed_target(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, mix: float
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8)
    measure, measured = refine.measure_candidates, []

    def noted(work: Any, dense: Any, candidates: Any, *rest: Any) -> Any:
        weights = [{name: candidate[name].weight.clone() for name in dense} for candidate in candidates]
        result = measure(work, dense, candidates, *rest)
        measured.append((weights, result[1]))
        return result

    monkeypatch.setattr(refine, "measure_candidates", noted)
    report = run(llama, tmp_path / "out", tokens, refine="swaps", swaps=20, target_mix=mix, guard=0.25, batch_size=3)
    places = [(layer.index, block) for layer in report.layers for block in layer.blocks]
    held_out = load_file(tokens)["input_ids"][-2:]
    otherwise = 0  # would be decided by errors that know nothing of the dense model's activations
    for (index, block), (candidates, distances) in zip(places, measured, strict=True):
        output = {"attention": "self_attn", "mlp": "mlp"}[block.name]
        mixed, plain = (
            distances_in_memory(llama, tmp_path / "out", held_out, index, output, candidates, target_mix)
            for target_mix in (mix, 0.0)
        )
        assert distances == pytest.approx(mixed, rel=1e-4)
        assert block.rejected == (mixed[1] >= mixed[0])
        otherwise += block.rejected != (plain[1] >= plain[0])
    assert otherwise


def test_tuning_lowers_the_layers_error_and_keeps_masks(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "solved", tokens, reconstruct="least-squares", target_mix=1.0, guard=0.25)
    report = run(llama, tmp_path / "tuned", tokens, reconstruct="tune", target_mix=1.0, tune_passes=10, guard=0.25)
    solved, tuned = read_folder(tmp_path / "solved"), read_folder(tmp_path / "tuned")
    linears = [name for name in solved if "_proj" in name]
    assert all(torch.equal(solved[name] != 0, tuned[name] != 0) for name in linears if "layers.0" in name)
    assert any(not torch.equal(solved[name], tuned[name]) for name in linears)
    assert all(torch.equal(solved[name], tuned[name]) for name in solved.keys() - set(linears))
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = load_file(tokens)["input_ids"]
    errors = []
    for name in ("solved", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        states = [network(ids, output_hidden_states=True).hidden_states[1] for network in (model, dense)]
        errors.append((states[0] - states[1]).square().mean().item())
    assert errors[1] < errors[0]
    assert report.kept_weights == "tune"
    assert "from tuning of each layer" in (tmp_path / "tuned" / "README.md").read_text()
    assert not inspect(InspectConfig(model=tmp_path / "tuned", dense=llama)).problems


def test_every_preset_runs_and_says_what_kept_weights_are(tmp_path: Path, llama: Path, tokens: Path) -> None:
    kept = {}
    for preset in Preset:
        report = run(llama, tmp_path / preset, tokens, preset=preset, rebuild=None)
        kept[preset] = report.kept_weights
        assert (report.granularity is not None) is (preset is Preset.PAPER)
        assert report.sparsity == pytest.approx(0.5, abs=0.003)
        inspection = inspect(InspectConfig(model=tmp_path / preset, dense=llama))
        assert not inspection.problems
        assert (inspection.updated is not None) is (preset is Preset.BEST)
        assert inspection.updated is None or 0 < inspection.updated <= report.weights - report.pruned
    assert kept == {"paper": "dense", "mask": "dense", "best": "tune"}
    with pytest.raises(SettingsError, match="keep-updates goes with neither"):
        PruneConfig(model=llama, output=tmp_path / "no", preset="mask", initial="sparsegpt", keep_updates=True)


def test_one_swap_a_row_is_one_swap_a_row(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Held-out windows are asked after parts of the swaps, each of which is at least one."""
    report = run(llama, tmp_path / "out", tokens, refine="swaps", swaps=1, guard=0.25)
    assert 0 < report.swapped <= sum(linear.shape[0] for linear in report.linears)


@pytest.mark.parametrize(("pattern", "most"), [(None, 100), (NofM(2, 4), 400)], ids=str)
def test_how_many_swaps_a_row_makes_by_default(pattern: NofM | None, most: int) -> None:
    """All 600 pairs of each row gain."""
    weight = torch.tensor([1.0, 1.0, 2.0, 2.0]).repeat(2, 300)
    pruned = PrunedLinear(weight == 1, weight * (weight == 1), weight, pattern)
    for swaps, expected in ((None, most), (7, 7), (1000, 600)):
        config = PruneConfig(model="model", output="out", refine="swaps", swaps=swaps, guard=0)
        settings = RefineSettings.of(config, pattern, 8, 64)
        assert settings is not None
        refined = refine_linear(pruned, weight, Objective(torch.eye(1200), None), None, settings)
        assert (refined.keep & (weight == 2)).sum(1).tolist() == [expected, expected]
