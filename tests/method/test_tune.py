"""Tuning of whole layers: masks by their scores, then values."""

from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, inspect
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.errors import NotFiniteError
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.method import distance as distances
from llm_barber.method import tune
from llm_barber.method.distance import Distance
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.record.report import RunReport
from llm_barber.run.stream import _summary
from llm_barber.settings.refining import RefineSettings
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.tuned_runs import SEQUENCES, masks, run
from tests.model.reference import captured, first_call, layer_call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=2)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return save_tokens(tmp_path / "tokens.safetensors", sequences=SEQUENCES)


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
