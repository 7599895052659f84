"""Pickled weights become safetensors bit for bit, and nothing in a pickle is run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, SettingsError
from llm_barber.settings.tools import ConvertConfig
from llm_barber.tools.convert import PICKLED, PICKLED_INDEX, convert, pickled_files
from tests.conftest import read_folder


class Boom:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def pickled(folder: Path, content: Any, name: str = PICKLED, **how: Any) -> None:
    """Put pickled weights in the place of a checkpoint's own."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save(content, folder / name, **how)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, llama: Path, zipped: bool) -> None:
    dense = read_folder(llama)
    tied = {**dense, "lm_head.weight": dense["model.embed_tokens.weight"]}  # one memory
    pickled(llama, tied, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="no safetensors") as caught:
        CheckpointSource(llama)
    assert "llm-barber convert" in caught.value.hint
    report = convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))
    written = read_folder(tmp_path / "out")
    assert written.keys() == tied.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tied.items())
    assert (report.files, report.tensors) == (1, len(tied))
    assert report.bytes == sum(tensor.nbytes for tensor in tied.values())
    assert CheckpointSource(tmp_path / "out").tensors.keys() == tied.keys()
    assert (tmp_path / "out" / "config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_shards(tmp_path: Path, llama: Path) -> None:
    dense = read_folder(llama)
    names = sorted(dense)
    files = {"pytorch_model-00001-of-00002.bin": names[:3], "pytorch_model-00002-of-00002.bin": names[3:]}
    for file, members in files.items():
        pickled(llama, {name: dense[name] for name in members}, file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (llama / PICKLED_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert convert(ConvertConfig(model=str(llama), output=tmp_path / "out")).files == 2
    written = read_folder(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in dense.items())
    (llama / PICKLED_INDEX).write_text(
        json.dumps({"weight_map": weight_map | {"more": "pytorch_model-00001-of-00002.bin"}})
    )
    with pytest.raises(ModelError, match="do not agree on 'more'"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))
    (llama / PICKLED_INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="names no tensors"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))
    (llama / PICKLED_INDEX).unlink()
    with pytest.raises(ModelError, match=f"has no {PICKLED_INDEX}"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))
    (llama / PICKLED_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (llama / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match="shard pytorch_model-00002-of-00002.bin"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))
    (llama / PICKLED_INDEX).write_text(json.dumps({"weight_map": {"x": "../elsewhere.bin"}}))
    with pytest.raises(ModelError, match="not a file of its folder"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))
    (llama / PICKLED_INDEX).write_text("[]")
    with pytest.raises(ModelError, match="no weight_map"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "again"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": torch.zeros(2), "y": 3}, "holds 'y', which is not a plain tensor"),
        ({"x": torch.eye(2).to_sparse()}, "holds 'x', which is not a plain tensor"),
        ([torch.zeros(2)], "no mapping of names to tensors"),
        ({}, "no mapping of names to tensors"),
        ({"__metadata__": torch.zeros(2)}, "holds '__metadata__'"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "holds 'x', which is not a plain tensor"),
        ({"x": torch.zeros(1).expand(1000, 1000)}, "holds 'x', which is not a plain tensor"),
    ],
)
def test_what_is_not_weights_is_refused(tmp_path: Path, llama: Path, content: Any, message: str) -> None:
    pickled(llama, content)
    with pytest.raises(ModelError, match=message):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize("plain", [False, True], ids=["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, llama: Path, plain: bool) -> None:
    content = {"x": Boom(tmp_path / "made")}
    if plain:
        (llama / "model.safetensors").unlink()
        (llama / PICKLED).write_bytes(pickle.dumps(content))
    else:
        pickled(llama, content)
    with pytest.raises(ModelError, match="cannot be read safely"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_files(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match=f"has no {PICKLED}"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))
    with pytest.raises(SettingsError, match="is MODEL"):
        ConvertConfig(model=str(llama), output=llama, overwrite=True)
    pickled(llama, {"x": torch.zeros(100)})
    (llama / PICKLED).write_bytes((llama / PICKLED).read_bytes()[:300])
    with pytest.raises(ModelError, match="cannot be read safely"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))


@pytest.mark.parametrize(("model", "hint"), [("folder", "needs no converting"), ("model.gguf", "read a GGUF file")])
def test_hint_for_a_model_without_pickled_weights(llama: Path, model: str, hint: str) -> None:
    with pytest.raises(ModelError) as error:
        pickled_files(llama, model)
    assert hint in str(error.value.hint)


def test_index_nested_too_deeply(llama: Path, tmp_path: Path) -> None:
    (llama / PICKLED_INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read: it is nested too deeply"):
        convert(ConvertConfig(model=str(llama), output=tmp_path / "out"))
