"""Inspection finds every change of a checkpoint that its record or the dense model shows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, PruneConfig, inspect, prune
from llm_barber.checkpoint.digests import with_digest
from llm_barber.errors import ModelError
from tests.conftest import Listener, change_json, make_model, save_tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA, pruned; tests change copies."""
    folder = tmp_path_factory.mktemp("inspected")
    tokens = save_tokens(folder / "tokens.safetensors")
    settings = {"calibration": tokens, "pattern": "2:4", "preset": "paper"}
    prune(PruneConfig(model=make_model(folder / "llama", "llama"), output=folder / "pruned", **settings))
    return folder / "pruned"


@pytest.fixture
def pruned(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made, tmp_path / "pruned")


def problems(model: Path, dense: Path | None = None) -> str:
    return "; ".join(inspect(InspectConfig(model=str(model), dense=None if dense is None else str(dense))).problems)


def change(folder: Path, name: str, edit: object) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, path, {"format": "pt"})


def test_all_is_as_the_record_and_the_dense_model_say(pruned: Path, llama: Path) -> None:
    inspection = inspect(InspectConfig(model=str(pruned), dense=str(llama)))
    assert inspection.problems == ()
    assert inspection.record
    assert inspection.sparsity == 0.5
    assert inspection.patterns[:2] == ("2:4", "4:8")
    assert len(inspection.linears) == 14
    assert {linear.zero_in_dense for linear in inspection.linears} == {0}


def test_a_dense_model_has_no_patterns(llama: Path) -> None:
    inspection = inspect(InspectConfig(model=str(llama)))
    assert (inspection.sparsity, inspection.patterns, inspection.record) == (0.0, (), False)


NAME = "model.layers.1.mlp.up_proj.weight"


def test_changes_are_found(pruned: Path, llama: Path) -> None:
    def grow(tensor: torch.Tensor) -> None:
        tensor.view(-1)[(tensor.view(-1) == 0).nonzero()[0]] = 1.0

    change(pruned, NAME, grow)
    messages = problems(pruned)
    assert "has changed since it was written" in messages
    assert "layer 1 mlp.up_proj has 1023 zeros, the record says 1024" in messages
    assert "layer 1 mlp.up_proj does not hold 2:4" in messages
    assert f"{NAME} differs from the dense model in 1 kept weights" in problems(pruned, llama)


def test_one_kept_bit_is_found(pruned: Path, llama: Path) -> None:
    def flip(tensor: torch.Tensor) -> None:
        bits = tensor.view(torch.int32).view(-1)
        bits[(bits != 0).nonzero()[5]] ^= 1

    change(pruned, NAME, flip)
    (pruned / "barber.json").unlink()
    assert problems(pruned) == ""
    assert problems(pruned, llama) == f"{NAME} differs from the dense model in 1 kept weights"


def test_negative_zero_is_found(pruned: Path, llama: Path) -> None:
    change(pruned, NAME, lambda tensor: tensor.masked_fill_(tensor == 0, -0.0))
    assert f"{NAME} has 1024 pruned weights that are -0.0" in problems(pruned, llama)


def test_other_tensors_must_be_equal(pruned: Path, llama: Path) -> None:
    change(pruned, "model.norm.weight", lambda tensor: tensor.zero_())
    assert "model.norm.weight differs from the dense model in 32" in problems(pruned, llama)


def test_another_dense_model(pruned: Path, tmp_path: Path) -> None:
    assert "differs from the dense model" in problems(pruned, make_model(tmp_path / "b", "llama", seed=1))
    assert "in the dense model (48, 32)" in problems(pruned, make_model(tmp_path / "c", "llama", intermediate_size=48))
    assert "is in the dense model only" in problems(pruned, make_model(tmp_path / "d", "llama", num_hidden_layers=3))


def test_a_record_that_is_damaged_or_of_another_model(pruned: Path, llama: Path) -> None:
    record = (pruned / "barber.json").read_text()
    (llama / "barber.json").write_text(record)
    assert "model-00001-of-00003.safetensors is in the record, not in the folder" in problems(llama)
    assert "has 0 zeros, the record says" in problems(llama)
    change_json(pruned / "barber.json", record_version=99)
    with pytest.raises(ModelError, match="has version 99"):
        problems(pruned)
    for wrong in (
        {"layers": 3},
        {"calibration": {}},
        {"seconds": {}},
        {"versions": {}},
        {"granularity": "row", "rebuild_ratio": None},
        {"settings": {"include": 1}},
    ):
        (pruned / "barber.json").write_text(record)
        change_json(pruned / "barber.json", **wrong)
        with pytest.raises(ModelError, match="is not a record of this program"):
            problems(pruned)


def test_a_changed_configuration_is_found(pruned: Path) -> None:
    change_json(pruned / "config.json", rms_norm_eps=1.0)
    assert problems(pruned) == "config.json has changed since it was written (sha256)"


def test_a_file_that_the_record_leaves_out_is_found(pruned: Path) -> None:
    files = json.loads((pruned / "barber.json").read_text())["files"]
    del files["model-00002-of-00003.safetensors"]
    change_json(pruned / "barber.json", files=files)
    assert problems(pruned) == "model-00002-of-00003.safetensors is in the folder, not in the record"


def test_an_unknown_architecture_is_inspected_by_structure(pruned: Path) -> None:
    (pruned / "barber.json").unlink()
    change_json(pruned / "config.json", model_type="something_new")
    inspection = inspect(InspectConfig(model=str(pruned)))
    assert len(inspection.linears) == 14
    assert inspection.sparsity == 0.5


@pytest.mark.parametrize("shape", [(2048,), (64, 0), (0, 32), (64, 32, 1)])
def test_a_linear_of_an_odd_shape(llama: Path, shape: tuple[int, ...]) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, NAME: torch.zeros(shape)}, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=f"{NAME} of .* has shape .*, which is not that of the linear mlp.up_proj"
    ) as caught:
        inspect(InspectConfig(model=str(llama)))
    assert "do not belong together" in caught.value.hint


def test_a_record_that_cannot_be_read(pruned: Path) -> None:
    record = json.loads((pruned / "barber.json").read_text())
    linear = record["layers"][0]["blocks"][0]["linears"][0]
    for key, value, words in (("pattern", "4:2", "must keep"), ("pruned", 10**400, "beyond 64 bits")):
        before = linear[key]
        linear[key] = value
        (pruned / "barber.json").write_text(json.dumps(with_digest(record)))
        with pytest.raises(ModelError, match=f"is not a record of this program .*{words}"):
            problems(pruned)
        linear[key] = before


def test_a_model_that_prune_does_not_take_is_told_of(llama: Path) -> None:
    change_json(llama / "config.json", rms_norm_eps=float("inf"))
    listener = Listener()
    inspection = inspect(InspectConfig(model=str(llama)), listener)
    assert len(inspection.linears) == 14
    (warning,) = listener.warnings
    assert warning.startswith("every matrix of a numbered layer is counted")
    assert "rms_norm_eps" in warning
