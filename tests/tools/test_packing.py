"""Packed checkpoints: round trip of the files, what reads them, and hostile ones."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_barber import EvaluateConfig, InspectConfig, PackConfig, PruneConfig, evaluate, inspect, pack, prune, unpack
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.index import PACKED_INDEX
from llm_barber.checkpoint.packed_table import TABLE_KEY
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, OutputError, SettingsError
from llm_barber.runtime.load import load
from tests.conftest import Listener, make_model, save_tokens
from tests.helpers.damage import damaged
from tests.helpers.text import add_tokenizer


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model, beside `dense`; tests do not change them."""
    folder = tmp_path_factory.mktemp("packing")
    model = make_model(folder / "dense", "llama", dtype=torch.bfloat16)
    add_tokenizer(model)
    tokens = save_tokens(folder / "tokens.safetensors")
    prune(PruneConfig(model=model, output=folder / "pruned", calibration=tokens, pattern="2:4", preset="paper"))
    return folder / "pruned"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_come_back_and_packed_ones_can_be_read(tmp_path: Path, pruned: Path) -> None:
    report = pack(PackConfig(model=pruned, output=tmp_path / "packed"))
    assert report.packed == {"2:4": 14}
    assert report.bytes_after < report.bytes_before
    assert not list((tmp_path / "packed").glob("model*"))  # nothing that another program takes for a model
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(pruned)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "stored without their zeros" in card
    assert "llm_barber.register()" in card
    assert 'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")' in card
    assert "the format is dense" not in card
    assert not inspect(InspectConfig(model=tmp_path / "unpacked")).problems
    seen = inspect(InspectConfig(model=tmp_path / "packed", dense=pruned.with_name("dense")))
    assert seen.problems == ()
    assert seen.patterns == inspect(InspectConfig(model=pruned)).patterns
    (tmp_path / "text.txt").write_text("any text, over and over. " * 10)
    settings = {"text": (str(tmp_path / "text.txt"),), "seqlen": 16, "windows": 4}
    results = [evaluate(EvaluateConfig(model=model, **settings)).texts for model in (pruned, tmp_path / "packed")]
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_checkpoints_come_back_too(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][torch.rand(tensors[name].shape) < 0.7] = 0
    save_file(tensors, model / "model.safetensors", {"made by": "another tool"})
    report = pack(PackConfig(model=model, output=tmp_path / "packed"))
    assert report.packed == {"bitmask": 1}
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(model)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_stacked_experts_are_packed(tmp_path: Path, family: str) -> None:
    model = make_model(tmp_path / "dense", family, dtype=torch.bfloat16)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, sparsity=0.7, report=False))
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "packed"))
    source = CheckpointSource(tmp_path / "packed")
    shapes = [entry.shape for table in source.packed.values() for entry in table.packed.values()]
    assert sum(len(shape) == 3 for shape in shapes) == 4  # two stacks in each of two layers
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "pruned")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "packed")(ids).logits, expected(ids).logits)


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path, pruned: Path) -> None:
    pack(PackConfig(model=pruned, output=tmp_path / "packed"))
    left = shutil.copytree(tmp_path / "packed", tmp_path / "again.partial")  # all but the rename
    (left / LOCK_NAME).touch()
    (left / "packed-more.safetensors").write_bytes(b"half a shard")
    pack(PackConfig(model=pruned, output=tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "packed")
    assert not left.exists()


def test_transposed_weights_are_packed_and_loaded(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as (in, out), in modules that are no linears: they stay dense in memory."""
    folder, tokens = make_model(tmp_path / "dense", "gpt2"), save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=folder, output=tmp_path / "out", calibration=tokens, sparsity=0.7, dtype="float32"))
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "packed"))
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        expected = load(tmp_path / "out")(inputs).logits
        assert torch.equal(load(tmp_path / "packed")(inputs).logits, expected)
        assert torch.equal(load(tmp_path / "packed", keep_packed=True)(inputs).logits, expected)


def test_a_model_that_is_not_pruned_is_packed_with_a_warning(tmp_path: Path, llama: Path) -> None:
    listener = Listener()
    report = pack(PackConfig(model=str(llama), output=tmp_path / "packed"), listener)
    assert report.packed == {}
    assert listener.warnings == [f"{llama} has no matrix that packing makes smaller: is it pruned?"]


def test_bad_input(tmp_path: Path, pruned: Path) -> None:
    packed = tmp_path / "packed"
    with pytest.raises(ModelError, match="is not packed"):
        unpack(PackConfig(model=pruned, output=tmp_path / "out"))
    pack(PackConfig(model=pruned, output=packed))
    with pytest.raises(ModelError, match="is packed already"):
        pack(PackConfig(model=packed, output=tmp_path / "out"))
    with pytest.raises(OutputError, match="exists"):
        pack(PackConfig(model=pruned, output=packed))
    with pytest.raises(SettingsError, match="is PRUNED"):
        PackConfig(model=pruned, output=pruned / "." / "x" / "..", overwrite=True)
    with pytest.raises(SettingsError, match="contains PRUNED"):
        PackConfig(model=pruned, output=pruned.parent, overwrite=True)

    def broken(problem: str) -> None:
        with pytest.raises(ModelError, match=problem) as caught:
            unpack(PackConfig(model=copy, output=tmp_path / "out"))
        assert caught.value.hint
        assert not (tmp_path / "out").exists()
        shutil.rmtree(copy)

    copy = shutil.copytree(packed, tmp_path / "copy")
    index = json.loads((copy / PACKED_INDEX).read_text())
    (copy / PACKED_INDEX).write_text(json.dumps({**index, "version": 3}))
    broken("has format version 3")
    shutil.copytree(packed, copy)
    (copy / PACKED_INDEX).write_text(json.dumps({**index, "version": 2}))
    broken("has format version 1, packed.index.json has 2")
    shutil.copytree(packed, copy)
    min(copy.glob("packed-model*")).unlink()
    broken("is missing")
    shutil.copytree(packed, copy)
    shutil.copy(min(copy.glob("packed-model*")), copy / "packed-more.safetensors")
    broken("does not list packed-more")
    shutil.copytree(packed, copy)
    (copy / PACKED_INDEX).write_text(json.dumps({**index, "weight_map": {"a": "../../etc/passwd"}}))
    broken("not a file of its folder")
    shutil.copytree(packed, copy)
    (copy / PACKED_INDEX).write_text("[" * 100_000)
    broken("cannot be read")
    shutil.copytree(packed, copy)
    shard = max(copy.glob("packed-model*"))
    tensors = load_file(shard)
    save_file(tensors, shard)
    broken("no table of packed weights")
    shutil.copytree(packed, copy)
    with safe_open(shard, "pt") as handle:
        table = json.loads(handle.metadata()[TABLE_KEY])
    save_file(load_file(shard), shard, {TABLE_KEY: json.dumps({**table, "file": "a\0.safetensors"})})
    broken("which is not a file of its folder")


def test_fuzzed_files_are_refused_or_read(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "dense", "llama", num_hidden_layers=1, hidden_size=8, intermediate_size=16, vocab_size=8
    )
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "_proj" in name:
            tensor[torch.rand(tensor.shape) < 0.6] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    pack(PackConfig(model=model, output=tmp_path / "packed"))
    files = [tmp_path / "packed" / PACKED_INDEX, tmp_path / "packed" / "packed-model.safetensors"]
    originals = [path.read_bytes() for path in files]
    generator = random.Random(0)
    refused = 0
    for _ in range(4_000):
        place = generator.randrange(2)
        content = damaged(originals[place], generator, first=3000)
        files[place].write_bytes(content)
        try:
            source = CheckpointSource(str(tmp_path / "packed"))
            read = source.read(source.tensors)
            assert sum(tensor.numel() for tensor in read.values()) < 10_000
        except ModelError:
            refused += 1
        files[place].write_bytes(originals[place])
    assert 1200 < refused < 4000  # some changes are to values that may be anything
