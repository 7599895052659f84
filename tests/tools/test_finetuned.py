"""A fine-tuned model is written as the pruned checkpoint was, and its record continues."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from llm_barber import (
    InspectConfig,
    PackConfig,
    hold_zeros,
    inspect,
    pack,
    save_finetuned,
    unpack,
)
from llm_barber.checkpoint.companions import CARD_NAME, RECORD_NAME
from llm_barber.errors import ModelError, NotFiniteError, OutputError, SettingsError, VerificationError
from llm_barber.record.file import read_record
from tests.conftest import change_json, load_model, read_folder
from tests.helpers.trained import IDS, language_loss, make_pruned


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pruned(tmp_path_factory.mktemp("finetuned"))


def train(folder: Path, steps: int = 2, dtype: torch.dtype = torch.float32, names: str = "") -> PreTrainedModel:
    """The model of a pruned folder, trained with its zeros held; only parameters with `names` in their names."""
    model = load_model(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names in name)
    hold_zeros(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        language_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def problems(folder: Path, dense: Path | None = None) -> tuple[str, ...]:
    return inspect(InspectConfig(model=str(folder), dense=None if dense is None else str(dense))).problems


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma3", "mixtral"])
def test_it_is_the_trained_model(tmp_path: Path, family: str) -> None:
    """Also where linears lie in stacks, as (in, out), or inside of a model with images."""
    folder = make_pruned(tmp_path, family)
    model = train(folder)
    report = save_finetuned(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert problems(tmp_path / "out", tmp_path / "dense") == ()
    assert read_record(tmp_path / "out") == report
    before, after = read_folder(folder), read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    assert report.fine_tuning is not None
    assert set(report.fine_tuning.tensors) == {name for name in after if not torch.equal(before[name], after[name])}
    assert report.sparsity == read_record(folder).sparsity  # type: ignore[union-attr]


def test_the_checkpoint_keeps_its_shards_and_dtypes(tmp_path: Path) -> None:
    folder = make_pruned(tmp_path, dtype=torch.bfloat16)
    model = train(folder)
    save_finetuned(model, tmp_path / "out")
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as before, safe_open(tmp_path / "out" / shard.name, "pt") as after:
            assert before.keys() == after.keys()
            assert before.metadata() == after.metadata()
    state = model.state_dict()
    for name, tensor in read_folder(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name].bfloat16())
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


def test_the_record_and_the_card_say_that_it_was_trained(pruned: Path, tmp_path: Path) -> None:
    report = save_finetuned(train(pruned), tmp_path / "out")
    before = read_record(pruned)
    assert before is not None
    assert before.fine_tuning is None
    assert report.kept_weights == "fine-tuned"
    assert report.fine_tuning is not None
    assert report.fine_tuning.pruned == str(pruned)
    assert report.fine_tuning.record == json.loads((pruned / RECORD_NAME).read_text())["digest"]
    card = (tmp_path / "out" / CARD_NAME).read_text()
    assert "in one shot, and fine-tuned afterwards. Kept weights are new ones, from fine-tuning" in card
    assert "without training" in (pruned / CARD_NAME).read_text()
    assert "fine_tuning" not in json.loads((pruned / RECORD_NAME).read_text())


def test_tensors_that_were_not_trained_are_compared_with_the_dense_model(pruned: Path, tmp_path: Path) -> None:
    report = save_finetuned(train(pruned, names="mlp"), tmp_path / "out")
    assert report.fine_tuning is not None
    assert len(report.fine_tuning.tensors) == 6
    dense = pruned.parent / "dense"
    result = inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(dense)))
    assert result.problems == ()
    assert result.updated is not None
    assert 0 < result.updated <= 6 * 1024
    other = load_model(dense)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
        other.model.layers[0].self_attn.q_proj.weight[:, 0] += 1
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    kept = int(read_folder(pruned)["model.layers.0.self_attn.q_proj.weight"][:, 0].count_nonzero())
    assert kept > 0
    assert problems(tmp_path / "out", tmp_path / "other") == (
        f"model.layers.0.self_attn.q_proj.weight differs from the dense model in {kept} kept weights",
        "model.norm.weight differs from the dense model in 32 kept weights",
    )


def test_linears_that_the_run_had_changed_may_differ_from_the_dense_model(tmp_path: Path) -> None:
    """Tuned by the run, or rounded by `pack`; also after a second training."""
    folder = make_pruned(tmp_path, settings={"initial": None, "preset": "best", "rebuild": None, "samples": 1})
    save_finetuned(train(folder, names="up_proj"), tmp_path / "tuned")
    save_finetuned(train(tmp_path / "tuned", names="down_proj"), tmp_path / "twice")
    assert problems(tmp_path / "twice", tmp_path / "dense") == ()
    exact = make_pruned(tmp_path / "exact")
    pack(PackConfig(model=str(exact), output=tmp_path / "packed", values="int8"))
    unpack(PackConfig(model=str(tmp_path / "packed"), output=tmp_path / "rounded"))
    save_finetuned(train(tmp_path / "rounded", names="up_proj"), tmp_path / "trained")
    assert problems(tmp_path / "trained", tmp_path / "exact" / "dense") == ()


def test_the_card_of_a_model_that_was_unpacked_is_that_of_a_dense_one(tmp_path: Path) -> None:
    folder = make_pruned(tmp_path, settings={"format": "packed"})
    unpack(PackConfig(model=str(folder), output=tmp_path / "unpacked"))
    save_finetuned(train(tmp_path / "unpacked"), tmp_path / "out")
    card = (tmp_path / "out" / CARD_NAME).read_text()
    assert "the format is dense" in card
    assert "llm_barber.register()" not in card


def test_the_output_is_named_as_that_of_all_commands(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_finetuned(train(pruned), "~/out")
    assert (tmp_path / "out" / RECORD_NAME).is_file()
    with pytest.raises(SettingsError, match="is the current folder"):
        save_finetuned(train(pruned), tmp_path, overwrite=True)
    with pytest.raises(SettingsError, match="lies inside the pruned checkpoint"):
        save_finetuned(train(pruned), pruned / "inside")


def test_a_record_from_before_untrained_linears_were_noted(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_finetuned(train(pruned, names="mlp"), out)
    fine_tuning = json.loads((out / RECORD_NAME).read_text())["fine_tuning"]
    assert fine_tuning.pop("others_are_dense") is True
    change_json(out / RECORD_NAME, fine_tuning=fine_tuning)
    assert problems(out, pruned.parent / "dense") == ()


def test_untrained_linears_of_a_rounded_model_are_compared(pruned: Path, tmp_path: Path) -> None:
    save_finetuned(train(pruned, names="q_proj"), tmp_path / "out")
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "packed", values="int8"))
    assert problems(tmp_path / "packed", pruned.parent / "dense") == ()
    other = load_model(pruned.parent / "dense")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    (problem,) = problems(tmp_path / "packed", tmp_path / "other")
    assert "model.layers.0.mlp.up_proj.weight differs" in problem


def test_training_goes_on_from_a_trained_checkpoint(pruned: Path, tmp_path: Path) -> None:
    save_finetuned(train(pruned, names="q_proj"), tmp_path / "first")
    report = save_finetuned(train(tmp_path / "first", names="up_proj"), tmp_path / "second")
    assert report.fine_tuning is not None
    assert len(report.fine_tuning.tensors) == 4
    assert problems(tmp_path / "second", pruned.parent / "dense") == ()


def test_it_is_packed_and_unpacked(pruned: Path, tmp_path: Path) -> None:
    save_finetuned(train(pruned), tmp_path / "out")
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "packed"))
    unpack(PackConfig(model=str(tmp_path / "packed"), output=tmp_path / "unpacked"))
    assert (tmp_path / "unpacked" / RECORD_NAME).read_bytes() == (tmp_path / "out" / RECORD_NAME).read_bytes()
    assert problems(tmp_path / "packed") == ()


def test_patterns_hold(tmp_path: Path) -> None:
    folder = make_pruned(tmp_path, settings={"pattern": "2:4"})
    save_finetuned(train(folder), tmp_path / "out")
    result = inspect(InspectConfig(model=str(tmp_path / "out")))
    assert result.problems == ()
    assert "2:4" in result.patterns


def test_zeros_that_were_trained_are_refused(pruned: Path, tmp_path: Path) -> None:
    model = load_model(pruned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0].fill_(1)
    with pytest.raises(VerificationError, match=r"\d+ pruned weights are not zero any more, first in layer 1 mlp"):
        save_finetuned(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_negative_zeros_become_zeros(pruned: Path, tmp_path: Path) -> None:
    model = train(pruned)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.masked_fill_(weight == 0, -0.0)
    save_finetuned(model, tmp_path / "out")
    assert problems(tmp_path / "out", pruned.parent / "dense") == ()


def test_kept_weights_that_training_made_zero_are_counted(pruned: Path, tmp_path: Path) -> None:
    model = train(pruned)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0
    report = save_finetuned(model, tmp_path / "out")
    (linear,) = (linear for linear in report.layers[0].linears if linear.name == "mlp.up_proj")
    assert linear.zeros > linear.pruned
    assert problems(tmp_path / "out", pruned.parent / "dense") == ()


def test_outputs_are_those_of_the_model(pruned: Path, tmp_path: Path) -> None:
    model = train(pruned)
    save_finetuned(torch.compile(model), tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_what_cannot_be_continued(pruned: Path, tmp_path: Path) -> None:
    model = train(pruned)
    with pytest.raises(SettingsError, match="is the pruned checkpoint"):
        save_finetuned(model, pruned, overwrite=True)
    with pytest.raises(ModelError, match=r"has no barber\.json that could be continued"):
        save_finetuned(model, tmp_path / "out", pruned.parent / "dense")
    with pytest.raises(ModelError, match="no weight differs"):
        save_finetuned(load_model(pruned), tmp_path / "out")
    with pytest.raises(SettingsError, match="no model of transformers"):
        save_finetuned(nn.Linear(2, 2), tmp_path / "out")
    pack(PackConfig(model=str(pruned), output=tmp_path / "packed"))
    with pytest.raises(ModelError, match="is packed, and a fine-tuned checkpoint"):
        save_finetuned(model, tmp_path / "out", tmp_path / "packed")
    model.config._name_or_path = ""
    with pytest.raises(SettingsError, match="did not load the model from a folder"):
        save_finetuned(model, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(OutputError, match="exists"):
        save_finetuned(model, tmp_path / "out", pruned)
    other = make_pruned(tmp_path / "other", num_hidden_layers=1, intermediate_size=32)
    with pytest.raises(ModelError, match="has shape"):
        save_finetuned(model, tmp_path / "new", other)
    model.value_head = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"has no value_head\.weight, which the model has"):
        save_finetuned(model, tmp_path / "new", pruned)
    del model.value_head
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"model\.norm\.weight holds NaN or Inf after training"):
        save_finetuned(model, tmp_path / "new", pruned)


def test_a_pruned_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = make_pruned(tmp_path)
    model = train(folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"is not what barber\.json says"):
        save_finetuned(model, tmp_path / "out")


def test_records_with_wrong_fine_tuning_are_refused(pruned: Path, tmp_path: Path) -> None:
    save_finetuned(train(pruned), tmp_path / "out")
    for wrong in ({"pruned": "x"}, {"pruned": "x", "record": "y", "tensors": [], "versions": {}}, "yes"):
        change_json(tmp_path / "out" / RECORD_NAME, fine_tuning=wrong)
        with pytest.raises(ModelError, match="is not a record of this program"):
            read_record(tmp_path / "out")
