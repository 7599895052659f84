import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber.checkpoint.ahead import read_ahead
from llm_barber.checkpoint.companions import companions
from llm_barber.checkpoint.hub import INDEX_NAME
from llm_barber.checkpoint.locations import TensorInfo, split_by_bytes
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import HubError, ModelError
from tests.conftest import change_json
from tests.helpers.shards import split_in_two_shards


def test_single_and_sharded_read_the_same(llama: Path) -> None:
    single = CheckpointSource(llama).read(CheckpointSource(llama).tensors)
    split_in_two_shards(llama)
    source = CheckpointSource(llama)
    sharded = source.read(source.tensors)
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)
    assert source.tensors["model.norm.weight"] == TensorInfo("b.safetensors", (32,), "F32")


def test_groups_are_read_one_ahead_of_their_user(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = CheckpointSource(llama), CheckpointSource.read
    groups = [[name] for name in list(source.tensors)[:3]]
    started: list[list[str]] = []
    monkeypatch.setattr(CheckpointSource, "read", lambda self, names: (started.append(names), read(self, names))[1])
    assert list(read_ahead(source, [])) == []
    layers = read_ahead(source, groups)
    assert [list(next(layers)) for _ in range(2)] == groups[:2]
    layers.close()
    assert started == groups


def expect(folder: Path | str, message: str, hint: str, kind: type[Exception] = ModelError) -> None:
    with pytest.raises(kind, match=message) as caught:
        source = CheckpointSource(folder)
        source.read(source.tensors)
    assert hint in caught.value.hint


def test_no_such_model(tmp_path: Path) -> None:
    expect(tmp_path / "nothing", "no such model", "folder of a checkpoint")
    for name in ("a/b/c", "", "~nobody-here/x", "x" * 300, "foo..bar", "name-"):
        expect(name, "no such model", "folder")
    (tmp_path / "file").write_text("")
    expect(tmp_path / "file", "is a file, not a model", "GGUF")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect("nobody/nothing-at-all", "hub cannot be reached", "connection", HubError)


def test_missing_shard(llama: Path) -> None:
    split_in_two_shards(llama)[1].unlink()
    expect(llama, "shard b.safetensors of .* is missing", "whole")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_file(llama: Path, keep: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    expect(llama, "model.safetensors is truncated or not a safetensors file", "again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(llama: Path, value: float, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(llama / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    expect(llama, "model.layers.1.mlp.up_proj.weight in .*model.safetensors holds NaN or Inf", "damaged")


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", ".."])
def test_index_that_leaves_the_folder(llama: Path, name: str) -> None:
    split_in_two_shards(llama)
    (llama.parent / "b.safetensors").write_bytes((llama / "b.safetensors").read_bytes())
    index = json.loads((llama / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (llama / INDEX_NAME).write_text(json.dumps(index))
    expect(llama, "not a file of its folder", "do not trust")


def test_index_that_does_not_fit(llama: Path) -> None:
    split_in_two_shards(llama)
    index = json.loads((llama / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = "a.safetensors"
    (llama / INDEX_NAME).write_text(json.dumps(index))
    expect(llama, "which does not have it", "damaged")
    (llama / INDEX_NAME).write_text("{}")
    expect(llama, "no weight_map", "damaged")
    (llama / INDEX_NAME).write_text("{")
    expect(llama, "cannot be read", "damaged")


def test_pickles_are_not_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    expect(llama, "has no safetensors weights", "llm-barber convert")


def test_quantised_and_adapters_are_refused(llama: Path) -> None:
    change_json(llama / "config.json", quantization_config="odd")
    expect(llama, "quantised", "dequantise")
    change_json(llama / "config.json", quantization_config={"quant_method": "gptq"})
    expect(llama, r"quantised \(gptq\)", "dequantise")
    (llama / "adapter_config.json").write_text("{}")
    expect(llama, "PEFT adapter", "merge")


def test_broken_configuration(llama: Path) -> None:
    (llama / "config.json").write_text("[]")
    expect(llama, "not a JSON object", "damaged")
    (llama / "config.json").unlink()
    expect(llama, "no config.json", "checkpoint folder")
    (llama / "model.safetensors").rename(llama / "model-00001-of-00003.safetensors")
    expect(llama, "no config.json", "did not finish")


def test_companions_leave_weights_code_and_records_behind(llama: Path) -> None:
    for name in (
        "tokenizer.json",
        "barber.json",
        "modeling_evil.py",
        "README.md",
        "LICENSE",
        "x.bin",
        "chat_template.jinja",
    ):
        (llama / name).write_text("{}")
    templates = llama / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{}")
    (templates / "other.py").write_text("")
    names = {str(path.relative_to(llama)) for path in CheckpointSource(llama).companions()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip


def test_groups_of_bounded_size() -> None:
    sizes = {name: TensorInfo("f", (count,), "BF16") for name, count in {"a": 10, "b": 10, "c": 100, "d": 1}.items()}
    assert list(split_by_bytes(sizes, sizes, 45)) == [["a", "b"], ["c"], ["d"]]


def test_index_nested_too_deeply(llama: Path) -> None:
    split_in_two_shards(llama)
    (llama / INDEX_NAME).write_text('{"weight_map": ' + "[" * 100_000)
    expect(llama, "nested too deeply", "damaged")


def test_a_lone_surrogate_in_the_configuration(llama: Path) -> None:
    change_json(llama / "config.json", note="\ud800")
    expect(llama, "config.json cannot be read: it holds a lone surrogate", "damaged")
    change_json(llama / "config.json", note="\U0001f600")  # json writes it as a pair
    CheckpointSource(llama)


def test_a_tensor_twice_in_the_folder(llama: Path) -> None:
    _, second = split_in_two_shards(llama)
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.zeros(128, 32)}, second, {"format": "pt"})
    expect(llama, "has model.embed_tokens.weight twice, in a.safetensors and in b.safetensors", "again")


@pytest.mark.parametrize("name", ["a\0.safetensors", "", "\ud800", "x" * 300])
def test_index_with_a_name_that_no_file_has(llama: Path, name: str) -> None:
    split_in_two_shards(llama)
    index = json.loads((llama / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (llama / INDEX_NAME).write_text(json.dumps(index))
    expect(llama, "not a file of its folder|lone surrogate", "")


def test_a_single_file_goes_before_an_index(llama: Path) -> None:
    """As transformers loads it: both must speak of the same weights."""
    before = CheckpointSource(llama)
    expected, key = before.tensors, before.key
    (llama / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "of-an-older-save.safetensors"}}))
    assert CheckpointSource(llama).tensors == expected
    assert CheckpointSource(llama).key == key


def test_names_and_links_that_cannot_be_copied_are_refused(llama: Path) -> None:
    link = llama / "extra.json"
    link.symlink_to("nothing")
    with pytest.raises(ModelError, match="extra.json is a link to nothing"):
        companions(llama)
    link.unlink()
    Path(os.fsdecode(bytes(llama) + b"/\xff.json")).write_text("{}")
    with pytest.raises(ModelError, match=r"the name of .*\\xff.json is not valid UTF-8"):
        companions(llama)
