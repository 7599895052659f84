"""The output head, pruned on request."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PackConfig, PruneConfig, RebuildConfig, inspect, load, prune, rebuild, unpack
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.errors import ModelError, SettingsError
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.progress import Silent
from llm_barber.run.dry_run import dry_run
from tests.conftest import Listener, bits, make_model, read_folder, save_tokens

FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "lm_head", {"tie_word_embeddings": True}),
    ("llama", "lm_head", {"tie_word_embeddings": False}),
    ("gpt2", "lm_head", {}),  # tied, and its other weights are (in, out)
    ("gpt_neox", "lm_head", {}),
    ("opt", "lm_head", {"word_embed_proj_dim": 16}),
    ("gemma2", "lm_head", {}),  # tied, logits capped
    ("gptj", "lm_head", {}),  # with a bias
]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return save_tokens(tmp_path / "tokens.safetensors")


def run(model: Path, output: Path, tokens: Path, **settings: Any) -> Any:
    config = {"dtype": "float32", "report": False, **settings}
    return prune(PruneConfig(model=model, output=output, calibration=tokens, **config))


def head_inputs(folder: Path, tokens: Path, head: str) -> torch.Tensor:
    """Inputs of a written model's head, by transformers and a plain hook, (sequences, tokens, in)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states: list[torch.Tensor] = []
    model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        model(load_file(tokens)["input_ids"])
    return states[0]


@pytest.mark.parametrize(("family", "head", "changes"), FAMILIES, ids=lambda value: str(value))
def test_its_mask_is_the_methods_on_what_the_pruned_layers_give_it(
    tmp_path: Path, tokens: Path, family: str, head: str, changes: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "dense", family, **changes)
    report = run(model, tmp_path / "out", tokens, initial="wanda", prune_head=True, rebuild_ratio=0.5)
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    name = "embed_out.weight" if family == "gpt_neox" else f"{head}.weight"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    weight = loaded.get_submodule(head).weight.detach()
    squares = head_inputs(tmp_path / "out", tokens, head).square().sum(1).mean(0)
    keep = initial_mask(wanda(weight, squares), Unstructured(0.5), Granularity.OUTPUT)
    assert torch.equal(bits(written[name]), bits(torch.where(keep, weight, 0.0)))
    for other, tensor in dense.items():  # the embedding and the norms
        if other not in (name, f"transformer.{name}") and ".0." not in other and ".1." not in other:
            assert torch.equal(bits(written[other]), bits(tensor)), other
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings
    # The layers are pruned as without it.
    run(model, tmp_path / "without", tokens, initial="wanda", rebuild_ratio=0.5)
    for other, tensor in read_folder(tmp_path / "without").items():
        assert other == name or torch.equal(tensor, written[other])
    assert report.layers[-1].index == 2
    assert [linear.name for linear in report.layers[-1].linears] == [head]
    assert report.layers[-1].linears[0].zeros == int((written[name] == 0).sum())
    inspection = inspect(InspectConfig(model=tmp_path / "out", dense=str(model)))
    assert not inspection.problems
    assert (inspection.linears[-1].name, inspection.linears[-1].layer) == (head, 2)
    assert "with the output head" in report.changes


SETTINGS: list[dict[str, Any]] = [
    {"initial": "magnitude"},
    {"initial": "sparsegpt", "keep_updates": True},
    {"initial": "dsnot", "pattern": "2:4"},
    {"preset": "mask"},
    {"preset": "best", "guard": 0},
    {"preset": "mask", "pattern": "2:4"},
    {"allocation": "owl"},
    {"sparsities": {"lm_head": 0.25}, "skip_layers": (0, -1), "exclude": ("q_proj",)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_method(tmp_path: Path, tokens: Path, settings: dict[str, Any]) -> None:
    model = make_model(tmp_path / "dense", "llama", num_hidden_layers=3)
    report = run(model, tmp_path / "out", tokens, prune_head=True, **settings)
    (head,) = report.layers[-1].linears
    assert head.pruned / head.weights == (0.25 if "sparsities" in settings else 0.5)
    assert head.pattern == settings.get("pattern")
    assert (head.grown > 0) == ("initial" not in settings)
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    embedding, weight = dense["model.embed_tokens.weight"], written["lm_head.weight"]
    same = torch.equal(weight[weight != 0], embedding[weight != 0])
    assert same == (settings.get("preset") != "best" and not settings.get("keep_updates"))
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems


@pytest.mark.parametrize("tied", [True, False])
def test_resumed_with_the_head_alone(tmp_path: Path, tokens: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "dense", "llama", tie_word_embeddings=tied)
    run(model, tmp_path / "whole", tokens, preset="mask", prune_head=True)
    with monkeypatch.context() as patch:
        patch.setattr("llm_barber.run.stream.prune_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", tokens, preset="mask", prune_head=True)
    run(model, tmp_path / "out", tokens, preset="mask", prune_head=True, resume=True)
    whole, resumed = read_folder(tmp_path / "whole"), read_folder(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(bits(tensor), bits(resumed[name])) for name, tensor in whole.items())


def test_nothing_is_spread_where_the_head_alone_is_pruned(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    report = run(model, tmp_path / "out", tokens, prune_head=True, skip_layers=(0, 1))
    assert (report.allocation, report.resolved["preset"]) == ("uniform", "mask")
    assert report.refinement is not None
    assert report.refinement.startswith("the output head: at most 100 (with N:M 400) exact swaps a row (target mix 0.5")
    refinement = run(model, tmp_path / "both", tokens, prune_head=True).refinement
    assert refinement is not None
    assert "that tune masks (target mix 0.5" in refinement
    assert refinement.endswith(report.refinement)
    assert [sum(linear.pruned for linear in layer.linears) > 0 for layer in report.layers] == [False, False, True]


def test_packed_and_back(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    run(model, tmp_path / "plain", tokens, prune_head=True)
    run(model, tmp_path / "packed", tokens, prune_head=True, format="packed")
    unpack(PackConfig(model=str(tmp_path / "packed"), output=tmp_path / "back"))
    plain, back = read_folder(tmp_path / "plain"), read_folder(tmp_path / "back")
    assert plain.keys() == back.keys()
    assert all(torch.equal(bits(tensor), bits(back[name])) for name, tensor in plain.items())
    assert not inspect(InspectConfig(model=tmp_path / "back", dense=str(model))).problems


def test_dry_run_and_bad_input(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    good = {"model": model, "output": tmp_path / "out", "calibration": tokens}
    assert dry_run(PruneConfig(**good, prune_head=True)).linears == dry_run(PruneConfig(**good)).linears + 1
    with pytest.raises(ModelError, match="does not divide the 32 inputs of lm_head"):
        prune(PruneConfig(**good, prune_head=True, sparsities={"lm_head": "2:5"}))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_rebuild_says_that_the_head_is_dense_again(tmp_path: Path, tokens: Path, recorded: bool, tied: bool) -> None:
    model = make_model(tmp_path / "dense", "llama", tie_word_embeddings=tied)
    run(model, tmp_path / "out", tokens, prune_head=True, initial="magnitude")
    if not recorded:  # as another tool would have pruned it
        (tmp_path / "out" / RECORD_NAME).unlink()
    told = Listener()
    rebuild(RebuildConfig(dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens), told)
    assert any("output head" in message for message in told.warnings)
    again = read_folder(tmp_path / "again")
    assert ("lm_head.weight" not in again) is tied
    assert tied or torch.equal(again["lm_head.weight"], read_folder(model)["lm_head.weight"])
    told.warnings.clear()
    run(model, tmp_path / "without", tokens, initial="magnitude")
    (tmp_path / "without" / RECORD_NAME).unlink()
    rebuild(RebuildConfig(dense=model, pruned=tmp_path / "without", output=tmp_path / "more", calibration=tokens), told)
    assert not any("output head" in message for message in told.warnings)


def test_a_head_that_is_stored_beside_the_embedding_that_it_is_tied_to(tmp_path: Path, tokens: Path) -> None:
    """Two tensors that differ are not tied, as in transformers, whatever the configuration says."""
    model = make_model(tmp_path / "dense", "llama")
    path = model / "model.safetensors"
    tensors = load_file(path)
    head = torch.randn(128, 32, generator=torch.Generator().manual_seed(5))
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    loaded = load(model)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model)(load_file(tokens)["input_ids"]).logits
        assert torch.allclose(loaded(load_file(tokens)["input_ids"]).logits, expected, atol=1e-5)
    streamed = StreamedModel(str(model), torch.device("cpu"), torch.float32)
    states = streamed.hidden_states([load_file(tokens)["input_ids"]], Silent())[0]
    assert torch.allclose(streamed.skeleton.finish(states), expected, atol=1e-4)
    run(model, tmp_path / "out", tokens, prune_head=True)
    written = read_folder(tmp_path / "out")
    kept = written["lm_head.weight"] != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(written["lm_head.weight"][kept], head[kept])
    assert torch.equal(written["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems


def test_an_embedding_that_is_stored_under_the_heads_name(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    run(model, tmp_path / "plain", tokens)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, {"format": "pt"})
    run(model, tmp_path / "out", tokens)
    plain, written = read_folder(tmp_path / "plain"), read_folder(tmp_path / "out")
    assert "model.embed_tokens.weight" not in written
    assert all(torch.equal(tensor, written[name]) for name, tensor in plain.items() if "embed" not in name)
    with pytest.raises(ModelError, match=r"keeps its embedding as lm_head\.weight"):
        run(model, tmp_path / "no", tokens, prune_head=True)


def test_refused(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    for settings in ({"sparsities": {"lm_head": 0}}, {"sparsities": {".*": 0}}, {"exclude": ("lm_head",)}):
        with pytest.raises(SettingsError, match="another setting leaves it out|nothing to prune"):
            run(model, tmp_path / "out", tokens, prune_head=True, **settings)
    with pytest.raises(SettingsError, match="lm_head") as caught:
        run(model, tmp_path / "out", tokens, sparsities={"lm_head": 0.3})
    assert "--prune-head" in caught.value.hint
    with pytest.raises(SettingsError, match="too little, even with all calibration activations in files"):
        run(
            make_model(tmp_path / "wide", "llama", vocab_size=10**6),
            tmp_path / "out",
            tokens,
            prune_head=True,
            memory="1GiB",
        )
    assert not list(tmp_path.glob("out*"))


def test_the_made_heads_bytes_are_counted(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "llama")
    plan = dry_run(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, prune_head=True))
    run(model, tmp_path / "out", tokens, prune_head=True)
    assert plan.output_bytes == sum(tensor.nbytes for tensor in read_folder(tmp_path / "out").values())
