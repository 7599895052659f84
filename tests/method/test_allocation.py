from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber import PruneConfig, prune
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import BarberError, ModelError, NotFiniteError, SettingsError
from llm_barber.masking.budget import removal_costs, spread_budget
from llm_barber.masking.gradient_squares import FisherSums
from llm_barber.masking.owl import layer_sparsities, outlier_share
from llm_barber.masking.saliency import wanda
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.runs import read_untimed_files, run_stopped
from tests.model.reference import captured, first_call


@torch.no_grad()
def owl_in_memory(folder: Path, tokens: torch.Tensor, sparsity: float) -> list[float]:
    """OWL's sparsities from the whole dense model, with plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares, sizes = [], []
    for index, layer in enumerate(model.model.layers):
        calls = [first_call(model, model.model.layers, index, sequence[None]) for sequence in tokens]
        scores = []
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                inputs = [captured(layer, name, *call)[0] for call in calls]
                squares = sum(tensor.square().flatten(0, -2).sum(0) for tensor in inputs) / len(inputs)
                scores.append(wanda(linear.weight, squares))
        shares.append(outlier_share(scores))
        sizes.append(sum(score.numel() for score in scores))
    return layer_sparsities(shares, sizes, sparsity)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Model whose layers differ in their outliers."""
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    for index in range(3):
        weight = tensors[f"model.layers.{index}.mlp.up_proj.weight"]
        weight[: 4 * index] *= 30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_owl_in_a_streamed_run_equals_owl_in_memory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings = {"dtype": "float32", "batch_size": 2, "report": False, "allocation": "owl", "sparsity": 0.6}
    report = prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, rebuild=False, **settings))
    expected = owl_in_memory(model, load_file(tokens)["input_ids"], 0.6)
    assert max(expected) - min(expected) == pytest.approx(0.16)
    for layer, sparsity in zip(report.layers, expected, strict=True):
        for linear in layer.linears:
            assert linear.pruned == round(sparsity * linear.shape[0] * linear.shape[1])
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    written = read_folder(tmp_path / "out")
    assert (written["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() > 0.6
    # It goes on with the sparsities that it had, without another pass over the dense model.
    run_stopped(monkeypatch, model, tmp_path / "again", tokens, rebuild=False, allocation="owl", sparsity=0.6)
    monkeypatch.setattr("llm_barber.run.stream.allocate", None)
    prune(
        PruneConfig(model=model, output=tmp_path / "again", calibration=tokens, rebuild=False, resume=True, **settings)
    )
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(tmp_path / "out")


def test_bad_input(tmp_path: Path, model: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(SettingsError, match="allocation is not for patterns"):
        PruneConfig(model=model, output=tmp_path / "out", allocation="owl", pattern="2:4")
    with pytest.raises(SettingsError, match="are not within 0 and 0.99") as caught:
        prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, allocation="owl", sparsity=0.98))
    assert "uniform" in caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_alps_with_and_without_its_weights(tmp_path: Path, model: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"model": model, "calibration": tokens, "dtype": "float32", "report": False}
    settings |= {"initial": "alps", "rebuild": False}
    masks = []
    for updates in (False, True):
        out = tmp_path / str(updates)
        report = prune(PruneConfig(output=out, keep_updates=updates, **settings))
        assert report.kept_weights == ("updated" if updates else "dense")
        assert report.sparsity == 0.5
        masks.append({name: tensor for name, tensor in read_folder(out).items() if "_proj" in name})
    dense = read_folder(model)
    for name, plain in masks[0].items():
        assert torch.equal(plain != 0, masks[1][name] != 0)
        assert torch.equal(plain[plain != 0], dense[name][plain != 0])
        assert not torch.equal(plain, masks[1][name])


@pytest.mark.parametrize("family", ["llama", "gptj", "opt-350m", "gemma3_text"])
def test_by_loss_in_a_streamed_run_equals_gradients_of_the_whole_model(tmp_path: Path, family: str) -> None:
    folder, tokens = make_model(tmp_path / "dense", family), save_tokens(tmp_path / "tokens.safetensors")
    settings = {"model": folder, "calibration": tokens, "dtype": "float32", "allocation": "loss", "rebuild": False}
    outputs = [tmp_path / f"out{size}" for size in (1, 3)]
    for size, output in zip((1, 3), outputs, strict=True):
        report = prune(PruneConfig(output=output, batch_size=size, report=False, sparsity=0.6, **settings))
    assert read_untimed_files(outputs[0]) == read_untimed_files(outputs[1])
    sparsities = {
        f".{layer.index}.{linear.name}": linear.sparsity for layer in report.layers for linear in layer.linears
    }
    expected = sparsities_in_memory(folder, load_file(tokens)["input_ids"], 0.6, list(sparsities))
    assert list(sparsities.values()) == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert abs(0.6 * report.weights - report.pruned) < 1


def sparsities_in_memory(folder: Path, tokens: torch.Tensor, sparsity: float, ends: list[str]) -> list[float]:
    """Sparsities from the whole model's gradients, each sequence's loss summed over its tokens.

    `ends` of names give the order. The spread goes as much of the way to what costs least as the sparsity.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sums: dict[str, FisherSums] = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part.isdecimal() for part in name.split("."))
    }
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    for sequence in tokens:
        logits = model(sequence[None], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), sequence[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
        for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
            fisher = sums.setdefault(name, FisherSums(tuple(linears[name].weight.shape), torch.device("cpu")))
            information = gradient.flatten(0, -2).square().t() @ inputs.flatten(0, -2).square()
            fisher.rows += information.sum(1)
            fisher.columns += information.sum(0)
    names = [next(name for name in linears if name.endswith(end)) for end in ends]
    costs = [removal_costs(linears[name].weight, sums[name].rows, sums[name].columns) for name in names]
    return spread_budget(costs, [len(linears[name].weight) for name in names], sparsity, share=sparsity)


@pytest.mark.parametrize(("loss_tokens", "windows"), [(95, 3), (10, 1)])  # windows have 24 tokens
def test_by_loss_takes_gradients_of_the_first_windows_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, loss_tokens: int, windows: int
) -> None:
    """Windows are as many as there are tokens for, and at least one."""
    monkeypatch.setattr("llm_barber.method.allocation.LOSS_TOKENS", loss_tokens)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    settings: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "report": False}
    settings |= {"allocation": "loss", "sparsity": 0.6, "rebuild": False}
    report = prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings))
    sparsities = {
        f".{layer.index}.{linear.name}": linear.sparsity for layer in report.layers for linear in layer.linears
    }
    ids = load_file(tokens)["input_ids"]
    assert list(sparsities.values()) == pytest.approx(sparsities_in_memory(model, ids[:windows], 0.6, list(sparsities)))
    assert list(sparsities.values()) != pytest.approx(sparsities_in_memory(model, ids, 0.6, list(sparsities)))


def test_by_loss_goes_on_with_the_sparsities_that_it_had(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings = {"dtype": "float32", "batch_size": 2, "report": False, "allocation": "loss", "rebuild": False}
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings))
    run_stopped(monkeypatch, model, tmp_path / "again", tokens, rebuild=False, allocation="loss")
    monkeypatch.setattr("llm_barber.run.stream.allocate", None)
    prune(PruneConfig(model=model, output=tmp_path / "again", calibration=tokens, resume=True, **settings))
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(tmp_path / "out")


def test_each_layer_is_read_once_for_pruning_and_twice_for_the_allocation(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors outside the layers are read once in all."""
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings = {"dtype": "float32", "batch_size": 2, "report": False, "allocation": "loss", "rebuild": False}
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, **settings))
    tensors = load_file(model / "model.safetensors")
    read = CheckpointSource.read
    seen: Counter[str] = Counter()

    def noted(source: CheckpointSource, names: Iterable[str], *rest: Any) -> Any:
        names = list(names)
        seen.update(names)
        return read(source, names, *rest)

    monkeypatch.setattr(CheckpointSource, "read", noted)
    prune(PruneConfig(model=model, output=tmp_path / "again", calibration=tokens, **settings))
    assert [seen[name] for name in tensors if ".layers." not in name] == [
        1,
        1,
    ]  # the embedding, which is the head, and the norm
    assert [seen[f"model.layers.{index}.self_attn.q_proj.weight"] for index in range(3)] == [3, 3, 3]
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(tmp_path / "out")


@pytest.mark.parametrize(("factor", "error"), [(0.0, ModelError), (3e38, NotFiniteError)])
def test_gradients_that_say_nothing(tmp_path: Path, model: Path, factor: float, error: type[BarberError]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(error, match="gradients") as caught:
        prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, allocation="loss", dtype="float32"))
    assert "uniform" in caught.value.hint
