"""Tuning of whole layers: masks by their scores, then values."""

from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, RebuildConfig, inspect, prune, rebuild
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.errors import NotFiniteError, SettingsError
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.rebuild import Rebuilt
from llm_barber.masking.saliency import wanda
from llm_barber.method import distance as distances
from llm_barber.method import tune
from llm_barber.method.distance import Distance
from llm_barber.method.outcome import BlockOutcome
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.tune import Tuned
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.record.report import RunReport
from llm_barber.run.dry_run import dry_run
from llm_barber.run.stream import _summary
from llm_barber.settings.refining import RefineSettings
from tests.conftest import Listener, make_model, read_folder, save_tokens
from tests.model.reference import captured, first_call, layer_call

SEQUENCES = 10


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=2)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return save_tokens(tmp_path / "tokens.safetensors", sequences=SEQUENCES)


def run(model: Path, output: Path, tokens: Path, **settings: Any) -> RunReport:
    config = {"dtype": "float32", "batch_size": 3, "report": False, **settings}
    return prune(PruneConfig(model=model, output=output, calibration=tokens, **config))


def masks(folder: Path) -> dict[str, Tensor]:
    """Of all linears, by name."""
    return {name: tensor != 0 for name, tensor in read_folder(folder).items() if "_proj" in name}


class Adam:
    """By its formula, with the rate falling to 0 over so many steps."""

    def __init__(self, values: dict[str, Tensor], rates: dict[str, float], smallest: float, steps: int) -> None:
        self.values, self.rates, self.smallest, self.steps = values, rates, smallest, steps
        self.first = {name: torch.zeros_like(one) for name, one in values.items()}
        self.second = {name: torch.zeros_like(one) for name, one in values.items()}

    def move(self, name: str, gradient: Tensor, number: int) -> None:
        first = self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
        second = self.second[name] = 0.95 * self.second[name] + 0.05 * gradient**2
        change = first / (1 - 0.9 ** (number + 1)) / ((second / (1 - 0.95 ** (number + 1))).sqrt() + self.smallest)
        self.values[name] -= self.rates[name] * (1 - number / self.steps) * change


def tuned_in_memory(
    folder: Path, texts: Tensor, pattern: Pattern, mix: float, held_out: int, passes: int, both: bool = False
) -> dict[str, Tensor]:
    """Passes over masks, with autograd of the whole layer, and sorting row by row; over `both`, kept weights, too.

    Gives the pruned weights.
    """
    dense, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False) for _ in range(2)
    )
    written: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        calls = [first_call(model, model.model.layers, index, text[None]) for text in texts]
        of_dense = [first_call(dense, dense.model.layers, index, text[None]) for text in texts]
        whole = dense.model.layers[index]
        targets = [
            (1 - mix) * layer_call(whole, arguments, hidden) + mix * layer_call(whole, other[1], other[0])
            for (hidden, arguments), other in zip(calls, of_dense, strict=True)
        ]
        squares = torch.stack([one.abs().median(-2).values.square().view(-1) for one in targets]).sum(0)
        counts = (distances.HUGE * squares.median() / squares).clamp(max=1)
        linears = {name: one for name, one in layer.named_modules() if isinstance(one, torch.nn.Linear)}
        weights = {name: one.weight.clone() for name, one in linears.items()}

        def mean_squares(name: str, layer: Any = layer, calls: Any = calls) -> Tensor:
            inputs = torch.cat([captured(layer, name, *call)[0] for call in calls])
            return inputs.square().flatten(0, -2).sum(0) / len(inputs)

        wandas = {name: wanda(weights[name], mean_squares(name)) for name in linears}
        keep = {name: initial_mask(one, pattern, Granularity.OUTPUT) for name, one in wandas.items()}
        for name, one in linears.items():
            one.weight.copy_(weights[name] * keep[name])
        # Wanda again, on what the pruned layer gives its linears; a mask that is not the same is moved to the border.
        scores, steps = {}, {}
        for name in linears:
            inputs = mean_squares(name).sqrt()
            score = weights[name].abs() * inputs
            steps[name] = score.mean(1, keepdim=True) / torch.maximum(inputs, inputs.median())
            score /= score.mean(1, keepdim=True)
            scores[name] = torch.stack([start(*both, pattern) for both in zip(score, keep[name], strict=True)])

        def distance(
            members: Any, layer: Any = layer, calls: Any = calls, targets: Any = targets, counts: Tensor = counts
        ) -> Tensor:
            errors = [layer_call(layer, calls[n][1], calls[n][0]) - targets[n] for n in members]
            return torch.stack([(one.square() * counts).mean() for one in errors]).mean()

        training = len(texts) - held_out
        count = -(-training // 4)
        before = distance(range(training, len(texts))) if held_out else 0
        final = {name: one.weight.clone() for name, one in linears.items()}
        values = {name: one.clone() for name, one in weights.items()}
        changes = {name: torch.zeros_like(one) for name, one in weights.items()}
        rate = 0.04 if isinstance(pattern, NofM) and not both else 0.02
        of_scores = Adam(scores, dict.fromkeys(scores, rate), 1e-12, passes * count)
        of_changes = Adam(changes, dict.fromkeys(changes, 0.01), 1e-12, passes * count)
        order = torch.Generator().manual_seed(0)
        chosen = [step for _ in range(passes) for step in torch.randperm(count, generator=order).tolist()]
        for number, step in enumerate(chosen):
            own = [one.weight.requires_grad_() for one in linears.values()]
            found = torch.autograd.grad(distance(range(step, training, count)), own)
            for (name, one), gradient in zip(linears.items(), found, strict=True):
                one.weight.requires_grad_(False)
                of_scores.move(name, gradient * values[name], number)
                if both:
                    of_changes.move(name, gradient * keep[name] * steps[name], number)
                    values[name] = weights[name] + changes[name] * steps[name]
                rows = zip(scores[name], keep[name], strict=True)
                keep[name] = torch.stack([highest(*row, pattern) for row in rows])
                one.weight.copy_(values[name] * keep[name])
            ends_pass = (number + 1) % count == 0
            if ends_pass and not (held_out and distance(range(training, len(texts))) >= before):
                final = {name: one.weight.clone() for name, one in linears.items()}
        for name, one in linears.items():
            one.weight.copy_(final[name])
        written |= {f"model.layers.{index}.{name}.weight": one.weight.clone() for name, one in linears.items()}
    return written


def start(score: Tensor, keep: Tensor, pattern: Pattern) -> Tensor:
    """A row's scores: what is kept is above the border, what is not below."""
    groups = score.split(pattern.of if isinstance(pattern, NofM) else len(score))
    found = []
    for group, kept in zip(groups, keep.split(len(groups[0])), strict=True):
        ordered = group.sort().values
        pruned = int((~kept).sum())
        border = (ordered[pruned - 1] + ordered[pruned]) / 2
        above = torch.where(group > border, group + 0.01, border + 0.01 / (1 + border - group))
        below = torch.where(group < border, group - 0.01, border - 0.01 / (1 + group - border))
        found.append(torch.where(kept, above, below))
    return torch.cat(found)


def highest(score: Tensor, keep: Tensor, pattern: Pattern) -> Tensor:
    """As many of a row's highest scores as were kept, in each group of M."""
    groups = score.split(pattern.of if isinstance(pattern, NofM) else len(score))
    found = []
    for group, kept in zip(groups, keep.split(len(groups[0])), strict=True):
        mask = torch.zeros_like(kept)
        mask[group.argsort(descending=True)[: int(kept.sum())]] = True
        found.append(mask)
    return torch.cat(found)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NofM(2, 4)], ids=["60 %", "2:4"])
@pytest.mark.parametrize(("mix", "guard", "huge"), [(0.0, 0.0, 30.0), (0.5, 0.2, 1.0)])
def test_masks_equal_those_tuned_in_memory(
    tmp_path: Path,
    model: Path,
    tokens: Path,
    pattern: Pattern,
    mix: float,
    guard: float,
    huge: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distances, "HUGE", huge)  # at 1, half of the channels count for less
    how = {"pattern": str(pattern)} if isinstance(pattern, NofM) else {"sparsity": pattern.sparsity}
    settings = {"allocation": "uniform", "rebuild": False, "refine": "tune", "tune_passes": 2, "guard": guard}
    report = run(model, tmp_path / "out", tokens, target_mix=mix, **settings, **how)
    expected = tuned_in_memory(model, load_file(tokens)["input_ids"], pattern, mix, round(guard * SEQUENCES), 2)
    written, dense = read_folder(tmp_path / "out"), read_folder(model)
    assert report.swapped > 0
    for name, one in expected.items():
        found = written[name] != 0
        # Sums are made in another order: scores that are nearly equal may change places.
        assert (found != (one != 0)).float().mean() < 0.001, name
        assert torch.equal(written[name][found], dense[name][found])


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NofM(2, 4)], ids=["60 %", "2:4"])
def test_masks_and_weights_equal_those_tuned_in_memory(
    tmp_path: Path, model: Path, tokens: Path, pattern: Pattern
) -> None:
    how = {"pattern": str(pattern)} if isinstance(pattern, NofM) else {"sparsity": pattern.sparsity}
    settings = {"rebuild": False, "refine": "tune", "reconstruct": "tune", "tune_passes": 2, "guard": 0.2}
    report = run(model, tmp_path / "out", tokens, target_mix=0.5, **settings, **how)
    expected = tuned_in_memory(
        model, load_file(tokens)["input_ids"], pattern, 0.5, round(0.2 * SEQUENCES), 2, both=True
    )
    written, dense = read_folder(tmp_path / "out"), read_folder(model)
    assert report.kept_weights == "tune"
    for name, one in expected.items():
        assert ((written[name] != 0) != (one != 0)).float().mean() < 0.001, name
        both = (written[name] != 0) & (one != 0)
        change = ((one - dense[name]) * both).norm()
        assert change > 0.005 * one.norm()
        assert ((written[name] - one) * both).norm() < 0.001 * change


SETTINGS = [{"sparsity": 0.55}, {"pattern": "4:8"}, {"pattern": "3:5", "allow_dense_tail": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["55 %", "4:8", "3:5"])
def test_the_layers_come_nearer_and_the_budget_stays(
    tmp_path: Path, model: Path, tokens: Path, settings: dict[str, Any]
) -> None:
    errors = []
    ids = load_file(tokens)["input_ids"]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, output_hidden_states=True)
    for name, how in (("plain", {"refine": "none"}), ("tuned", {"target_mix": 1.0, "guard": 0})):
        report = run(model, tmp_path / name, tokens, preset="mask", **how, **settings)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        states = found(ids, output_hidden_states=True).hidden_states
        errors.append((states[1] - dense.hidden_states[1]).square().mean().item())
        assert not inspect(InspectConfig(model=tmp_path / name, dense=model)).problems
    assert errors[1] < 0.9 * errors[0]
    plain, tuned = (masks(tmp_path / name) for name in ("plain", "tuned"))
    assert all(torch.equal(plain[key].sum(1), tuned[key].sum(1)) for key in plain)
    assert report.kept_weights == "dense"
    came = sum(int((tuned[key] & ~plain[key]).sum()) for key in plain if "layers.0" in key)
    assert came == sum(one.grown for block in report.layers[0].blocks for one in block.linears)


def test_passes(tmp_path: Path, model: Path, tokens: Path) -> None:
    """Twice as many for masks and weights, unless a number was given."""
    for settings, words in (
        ({}, "8 passes that tune masks"),
        ({"reconstruct": "tune"}, "16 passes that tune masks and weights"),
        ({"reconstruct": "tune", "tune_passes": 3}, "3 passes that tune masks and weights"),
        ({"reconstruct": "tune", "refine": "none"}, "8 passes that tune weights"),
    ):
        report = run(model, tmp_path / "out", tokens, preset="mask", pattern="2:4", overwrite=True, **settings)
        assert words in (report.refinement or "")
        assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize(
    ("windows", "length", "passes"),
    [(128, 2048, 2), (64, 1024, 2), (32, 512, 4), (24, 512, 5), (16, 512, 8), (4, 64, 8)],
)
def test_as_many_passes_as_65536_tokens_take_within_bounds(windows: int, length: int, passes: int) -> None:
    """Two at least and eight at most; twice as many where masks and weights are tuned."""
    for settings, expected in (
        ({"preset": "mask"}, passes),
        ({"refine": "none", "reconstruct": "tune"}, passes),
        ({"preset": "best"}, 2 * passes),
        ({"preset": "mask", "tune_passes": 3}, 3),
        ({"preset": "best", "tune_passes": 3}, 3),
        ({"refine": "swaps"}, 0),
    ):
        found = RefineSettings.of(PruneConfig(model="model", output="out", **settings), None, windows, length)
        assert found is not None
        assert found.passes == expected, settings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_do_not_vanish(model: Path, dtype: torch.dtype) -> None:
    """However near the output is to its target, and whatever the compute dtype: they are those of float64."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).to(dtype)
    weight, hidden = torch.randn(8, 8, generator=generator), 0.01 * torch.randn(1, 4096, 8, generator=generator)
    layer = DecoderLayer(module, ("0",), lambda *_: {})
    streams = ActivationStreams(1, 1)
    streams.write("hidden", slice(0, 1), hidden.to(dtype))
    target = hidden.to(dtype) @ weight.to(dtype).t() * (1 + 0.02 * torch.randn(8, generator=generator)).to(dtype)
    streams.write(tune.TARGET, slice(0, 1), target)
    sums = {"0": torch.zeros(8, 8)}
    plain = Distance(torch.ones(8))
    tune._add_gradients(sums, layer, {"0": weight.to(dtype).requires_grad_()}, streams, slice(0, 1), plain)
    difference = (hidden.to(dtype) @ weight.to(dtype).t()).double() - target.double()
    expected = difference[0].t() @ hidden[0].to(dtype).double()
    assert (sums["0"] - expected).norm() < 0.02 * expected.norm()


def test_broken_gradients_are_told(tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sums: dict[str, Tensor], *_: Any) -> None:
        next(iter(sums.values()))[0, 0] = torch.nan

    monkeypatch.setattr(tune, "_add_gradients", broken)
    with pytest.raises(NotFiniteError, match="a gradient of layer 0, self_attn.q_proj, holds NaN or Inf"):
        run(model, tmp_path / "out", tokens, preset="mask")


def test_what_held_out_windows_reject_stays(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(model, tmp_path / "plain", tokens, preset="mask", refine="none", pattern="2:4")
    monkeypatch.setattr("llm_barber.method.tune.PATTERN_SCORE_RATE", -5.0)  # up the hill
    report = run(model, tmp_path / "out", tokens, preset="mask", pattern="2:4")
    assert report.rejected == 4
    assert report.swapped == plain.swapped == 0
    assert all(layer.kept_pass == 0 and len(layer.held_out) == 9 for layer in report.layers)
    assert all(layer.kept_pass is None for layer in plain.layers)
    one, other = read_folder(tmp_path / "plain"), read_folder(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("last", [6.0, torch.nan])
def test_the_last_pass_that_held_out_windows_like_better_than_none_is_kept(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, last: float
) -> None:
    """Not the one that they like best: by chance, an early one may seem so."""
    said = cycle([5.0, 2.0, 4.0, last])  # before, and after each pass, layer by layer
    after_steps: list[Tensor] = []
    moved = tune._Moving.moved

    def noted(moving: tune._Moving) -> None:
        moved(moving)
        after_steps.append(moving._now["mlp.up_proj"].keep.clone())

    monkeypatch.setattr(tune._Moving, "moved", noted)
    monkeypatch.setattr(Distance, "errors", lambda *_: torch.tensor([next(said)]))
    report = run(model, tmp_path / "out", tokens, preset="mask", pattern="2:4", tune_passes=3)
    assert (report.held_out, [layer.kept_pass for layer in report.layers]) == (1, [2, 2])
    assert "distance from the target −20% in the mean, 2 of 2 layers are kept as tuned" in (report.tuning or "")
    assert _summary(report.layers[0]).endswith(" swapped, held-out distance from the target 5 → 4")
    record = (tmp_path / "out" / RECORD_NAME).read_text()
    assert "NaN" not in record
    assert RunReport.model_validate_json(record).to_json() == record
    steps = len(after_steps) // 2 // 3  # of two layers, three passes each
    found = masks(tmp_path / "out")
    for index in range(2):
        one, two, three = after_steps[steps * 3 * index :][steps - 1 : 3 * steps : steps]
        kept = found[f"model.layers.{index}.mlp.up_proj.weight"]
        assert torch.equal(kept, two)
        assert not torch.equal(kept, one)
        assert not torch.equal(kept, three)


def test_batches_change_little(tmp_path: Path, model: Path, tokens: Path) -> None:
    """A step is of as many sequences, however many are computed together."""
    found = []
    for size in (1, 4, 10):
        run(model, tmp_path / str(size), tokens, preset="mask", pattern="2:4", batch_size=size, allocation=None)
        found.append(masks(tmp_path / str(size)))
    for other in found[1:]:
        assert sum(int((found[0][name] != other[name]).sum()) for name in other) < 0.002 * sum(
            one.numel() for one in other.values()
        )


@pytest.mark.parametrize(("family", "few_tokens"), [("qwen3_moe", 110), ("gpt_oss", 90), ("gpt2", 0), ("lfm2", 0)])
def test_families(tmp_path: Path, family: str, few_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, weights as (in, out), layers without attention; those with few tokens stay as they are."""
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", few_tokens)
    model, tokens = make_model(tmp_path / "dense", family), save_tokens(tmp_path / "tokens.safetensors", sequences=8)
    plain = run(model, tmp_path / "plain", tokens, preset="mask", refine="none", pattern="2:4")
    report = run(model, tmp_path / "out", tokens, preset="mask", reconstruct="none", pattern="2:4")
    assert report.swapped > 0
    assert report.sparsity == plain.sparsity
    few = [one for one in report.linears if one.few_tokens]
    assert all(one.grown == 0 for one in few)
    assert bool(few) is bool(few_tokens)
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=model)).problems


@pytest.mark.parametrize(("given", "of_head"), [(None, 0.5), (0.75, 0.75), (0.0, 0.0)])
def test_the_head_is_swapped_towards_its_own_target(given: float | None, of_head: float) -> None:
    """The default mix is of tuned masks: swaps with N:M do worse with it."""
    config = PruneConfig(model="model", output="out", pattern="2:4", prune_head=True, target_mix=given)
    settings = RefineSettings.of(config, NofM(2, 4), 8, 64)
    assert settings is not None
    assert settings.target_mix == (0.75 if given is None else given)
    assert settings.of_head.target_mix == of_head


@pytest.mark.parametrize(
    ("settings", "mix"),
    [
        ({"reconstruct": "least-squares"}, 0.25),
        ({"reconstruct": "least-squares", "target_mix": 0.5}, 0.5),
        ({"refine": "swaps", "reconstruct": "least-squares"}, 0.5),
        ({"reconstruct": "tune"}, 0.5),
    ],
)
def test_least_squares_alone_has_its_own_target(settings: dict[str, Any], mix: float) -> None:
    config = PruneConfig(model="model", output="out", **{"refine": "none", "prune_head": True, **settings})
    found = RefineSettings.of(config, None, 8, 64)
    assert found is not None
    assert (found.target_mix, found.of_head.target_mix) == (mix, mix)


def test_the_target_is_that_of_most_weights(tmp_path: Path, model: Path, tokens: Path) -> None:
    """Sparsities of linears' own can make most of a model N:M, or all but a few."""
    own: dict[str, dict[str, Any]] = {
        "all": {"sparsities": {".*": "2:4"}},
        "most": {"sparsities": {"mlp": "2:4"}},
        "few": {"sparsities": {"k_proj": "2:4"}},
        "others": {"sparsities": {".*": 0.5}, "pattern": "2:4"},
    }
    found = {}
    for name, settings in own.items():
        report = run(model, tmp_path / name, tokens, preset="mask", tune_passes=1, **settings)
        found[name] = report.resolved["target_mix"]
    assert found == {"all": 0.75, "most": 0.75, "few": 0.5, "others": 0.5}


@pytest.mark.parametrize("granularity", ["output", "block"])
@pytest.mark.parametrize("refine", ["none", "swaps", "tune"])
def test_what_was_swapped_is_told_from_the_initial_masks(
    tmp_path: Path, model: Path, tokens: Path, refine: str, granularity: str
) -> None:
    """A weight that the rebuild brings back, and a later step drops again, was not swapped."""
    run(model, tmp_path / "first", tokens, initial="magnitude", rebuild=False)
    settings = {"rebuild": True, "granularity": granularity, "rebuild_ratio": 1.0, "refine": refine}
    report = run(model, tmp_path / "out", tokens, initial="magnitude", **settings)
    before, after = read_folder(tmp_path / "first"), read_folder(tmp_path / "out")
    for layer in report.layers:
        for linear in layer.linears:
            name = f"model.layers.{layer.index}.{linear.name}.weight"
            came, went = (before[name] == 0) & (after[name] != 0), (before[name] != 0) & (after[name] == 0)
            assert (linear.grown, linear.dropped) == (int(came.sum()), int(went.sum()))
    assert report.swapped > 0


@pytest.mark.parametrize("reject", ["both", "linears", "layer"])
def test_a_block_is_rejected_if_nothing_of_it_is_kept(reject: str) -> None:
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
    assert sum(one.beneficial_pairs for one in report.linears) == 0
    with pytest.raises(SettingsError, match="leave nothing to do"):
        RebuildConfig(output=tmp_path / "other", rebuild=False, **settings)


def test_one_window_is_not_held_out(tmp_path: Path, model: Path) -> None:
    told = Listener()
    tokens = save_tokens(tmp_path / "one.safetensors", sequences=1)
    for guard in (None, 0.0):
        config = {"model": model, "calibration": tokens, "guard": guard, "report": False, "overwrite": True}
        prune(PruneConfig(output=tmp_path / "out", **config), told)
    (message,) = (one for one in told.warnings if "held out" in one)
    assert message == told.warnings[0]
    assert message.startswith("no window can be held out of one")
    planned = Listener()
    dry_run(PruneConfig(model=model, output=tmp_path / "other", calibration=tokens), planned)
    assert message in planned.warnings


@pytest.mark.parametrize(
    ("share", "sequences", "held_out"), [(0.07, 100, 7), (0.28, 25, 7), (0.29, 25, 8), (0.9, 1, 0), (1e-20, 4, 1)]
)
def test_the_share_that_is_held_out_is_read_as_it_is_written(share: float, sequences: int, held_out: int) -> None:
    config = PruneConfig(model="model", output="out", guard=share)
    settings = RefineSettings.of(config, None, sequences, 16)
    assert settings is not None
    assert settings.held_out == held_out


def test_a_preset_with_settings_of_ones_own_is_not_called_that(tmp_path: Path, model: Path, tokens: Path) -> None:
    common = {"model": model, "calibration": tokens, "report": False, "overwrite": True, "output": tmp_path / "out"}
    assert prune(PruneConfig(**common, preset="mask", refine="tune")).resolved["preset"] == "mask"
    for own in ({"guard": 0.0}, {"target_mix": 1.0}, {"tune_passes": 1}, {"preset": "mask", "initial": "magnitude"}):
        assert prune(PruneConfig(**common, **own)).resolved["preset"] is None


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
    """They count as kept, stay zero, and leave N:M and the number of zeros as they were."""
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, one in tensors.items():
        if "_proj" in name:
            one[torch.rand(one.shape, generator=generator) < 0.05] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    how = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    run(model, tmp_path / "pruned", tokens, initial="wanda", rebuild=False, **how)
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
def test_what_another_tool_pruned_after_the_last_whole_group_stays_pruned(
    tmp_path: Path, model: Path, tokens: Path, preset: str
) -> None:
    run(model, tmp_path / "pruned", tokens, pattern="3:5", allow_dense_tail=True, initial="wanda", rebuild=False)
    (tmp_path / "pruned" / RECORD_NAME).unlink()
    for path in (tmp_path / "pruned").glob("*.safetensors"):
        tensors = load_file(path)
        for name, one in tensors.items():
            if "_proj" in name:
                one[:, one.shape[1] // 5 * 5 :: 2] = 0
        save_file(tensors, path, {"format": "pt"})
    how = {"pattern": "3:5", "preset": preset, "guard": 0, "dtype": "float32"}
    rebuild(RebuildConfig(dense=model, pruned=tmp_path / "pruned", output=tmp_path / "out", calibration=tokens, **how))
    before, after = masks(tmp_path / "pruned"), masks(tmp_path / "out")
    for name in before:
        tail = before[name].shape[1] // 5 * 5
        assert not before[name][:, tail:].all()
        assert torch.equal(before[name][:, tail:], after[name][:, tail:])
        assert torch.equal(before[name].sum(1), after[name].sum(1))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("settings", [{"initial": "wanda"}, {"initial": "magnitude"}, {"preset": "best"}], ids=str)
def test_layers_with_nothing_but_idle_experts(
    tmp_path: Path, tokens: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 10**6)
    model = make_model(tmp_path / "dense", "mixtral")
    how = {"rebuild": False, "refine": "tune", "include": ("experts",), **settings}
    report = run(model, tmp_path / "out", tokens, **how)
    assert report.swapped == 0
    assert all(one.few_tokens for one in report.linears if one.pruned)
    written, dense = read_folder(tmp_path / "out"), read_folder(model)
    assert all(((one == dense[name]) | (one == 0)).all() for name, one in written.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": "tune", "reconstruct": "least-squares"}, "does not go with refine tune, which was asked"),
        ({"preset": "mask", "reconstruct": "least-squares"}, "is the preset's: give refine swaps or none, too"),
        ({"preset": "paper", "target_mix": 0.3}, "target_mix is of refine and reconstruct"),
        ({"preset": "paper", "guard": 0.3}, "guard is of refine and reconstruct"),
        ({"preset": "mask", "swaps": 10}, "swaps are of refine swaps"),
        ({"refine": "swaps", "tune_passes": 2}, "tune_passes are of refine tune and reconstruct tune"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, model: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PruneConfig(model=model, output=tmp_path / "out", **settings)
    if "preset" not in settings:
        with pytest.raises(SettingsError, match=message):
            RebuildConfig(dense=model, pruned=tmp_path, output=tmp_path / "out", **settings)


def test_steps_change_saliency_by_its_mean_in_the_row() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]])
    squares = torch.tensor([4.0, 0.25, 100.0])  # roots 2, ½, 10, the median 2
    of_row, of_column = tune.step_sizes(weight, squares)
    mean = (2 + 1 + 30) / 3
    assert torch.allclose(of_row * of_column, torch.tensor([[mean / 2, mean / 2, mean / 10], [0, 0, 0]]))
    of_row, of_column = tune.step_sizes(weight, torch.tensor([0.0, 0.0, 4.0]))  # the median of those that are alive
    assert torch.equal(of_column, torch.tensor([0.5, 0.5, 0.5]))
    of_row, of_column = tune.step_sizes(weight, torch.zeros(3))  # of an expert that no token went to
    assert torch.equal(of_row * of_column, torch.zeros(2, 3))


@pytest.mark.parametrize("held_out", [0, 3])
def test_steps_are_the_same_for_any_number_of_processes(held_out: int) -> None:
    settings = RefineSettings(swaps=0, target_mix=0.0, solve=False, held_out=held_out, passes=1, tunes_masks=True)
    every = 23
    found = []
    for count in (1, 2, 4, 7, 20):
        training = every - held_out
        borders = [training * rank // count for rank in range(count + 1)]
        steps: list[set[int]] = [set() for _ in range(settings.step_count(every))]
        for first, last in pairwise(borders):
            streams = SimpleNamespace(
                all_sequences=every, held_out=held_out, held_out_start=last - first, first_sequence=first
            )
            for step, own in zip(steps, settings.steps(cast(ActivationStreams, streams)), strict=True):
                step |= {first + place for place in own.own}
                assert own.sequences in (3, 4)
        found.append(steps)
    assert all(one == found[0] for one in found)
    assert set().union(*found[0]) == set(range(every - held_out))
    assert {len(step) for step in found[0]} <= {3, 4}
