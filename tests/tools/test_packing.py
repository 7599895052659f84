"""Packed checkpoints, exact and rounded: what they unpack to, what reads them, and what is refused."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import EvaluateConfig, InspectConfig, PackConfig, PruneConfig, evaluate, inspect, pack, prune, unpack
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.digests import with_digest
from llm_barber.checkpoint.packed_format import (
    KEY,
    PACKED_INDEX,
    TABLE_KEY,
    names_packed,
    packed_configuration,
    plain_configuration,
)
from llm_barber.checkpoint.rounding import GROUP, round_trip
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.cli.tables import show_inspection, show_packing
from llm_barber.errors import ModelError, OutputError, SettingsError, VerificationError
from llm_barber.record.file import read_record
from llm_barber.runtime.load import load
from tests.conftest import Listener, change_json, make_model, save_tokens
from tests.helpers.damage import damaged
from tests.helpers.text import add_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, `dense`, `pruned`, packed as it is and in int8, both `unpacked`; tests do not change them."""
    folder = tmp_path_factory.mktemp("packing")
    model = make_model(folder / "dense", "llama", dtype=torch.bfloat16)
    add_tokenizer(model)
    tokens = save_tokens(folder / "tokens.safetensors")
    prune(PruneConfig(model=model, output=folder / "pruned", calibration=tokens, pattern="2:4", preset="paper"))
    (folder / "pruned" / "evaluation.json").write_text("{}")
    for values in ("exact", "int8"):
        pack(PackConfig(model=folder / "pruned", output=folder / values, values=values))
        unpack(PackConfig(model=folder / values, output=folder / f"{values}-unpacked"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path) -> dict[str, Tensor]:
    source = CheckpointSource(folder)
    return source.read(source.tensors)


def shard_with(folder: Path, tensor: str) -> Path:
    return next(path for path in folder.glob("*.safetensors") if tensor in load_file(path))


def test_an_exact_copy_unpacks_to_the_files_that_were_packed(folders: Path) -> None:
    assert contents(folders / "exact-unpacked") == contents(folders / "pruned")
    sizes = [
        sum(path.stat().st_size for path in (folders / name).glob("*.safetensors")) for name in ("exact", "pruned")
    ]
    assert sizes[0] < sizes[1]
    assert not list((folders / "exact").glob("model*"))  # nothing that another program takes for a model
    card = (folders / "exact" / "README.md").read_text()
    assert "stored without their zeros" in card
    assert "llm_barber.register()  # without it, transformers finds no weights here\nmodel = AutoModel" in card
    assert "the format is dense" not in card


def test_a_rounded_copy_unpacks_to_rounded_weights(folders: Path) -> None:
    pruned, packed, unpacked = (read(folders / name) for name in ("pruned", "int8", "int8-unpacked"))
    linears = [name for name in pruned if "_proj" in name]
    assert len(linears) == 14
    for name, weight in pruned.items():
        expected = round_trip(weight, GROUP) if name in linears else weight
        assert torch.equal(packed[name], expected)
        assert torch.equal(unpacked[name], expected)
        assert torch.equal(packed[name], weight) == (name not in linears)


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_packed_and_unpacked_folders_are_one_model(folders: Path, tmp_path: Path, values: str) -> None:
    (tmp_path / "text.txt").write_text("any text, over and over. " * 10)
    settings = {"text": (str(tmp_path / "text.txt"),), "seqlen": 16, "windows": 4}
    names = (values, f"{values}-unpacked")
    with torch.no_grad():
        logits = [load(folders / name, verify=True)(IDS).logits for name in names]
    assert torch.equal(*logits)
    texts = [evaluate(EvaluateConfig(model=folders / name, **settings)).texts for name in names]
    assert texts[0] == texts[1]
    seen = [inspect(InspectConfig(model=folders / name, dense=folders / "dense")) for name in names]
    assert seen[0].problems == seen[1].problems == ()
    assert seen[0].patterns == seen[1].patterns


def test_records_pages_and_cards_say_that_weights_are_rounded(folders: Path, capsys: Any) -> None:
    before, after = read_record(folders / "pruned"), read_record(folders / "int8")
    assert before is not None
    assert after is not None
    assert after.rounding is not None
    assert before.rounding is None
    name, error = after.rounding.largest
    weight, restored = (read(folders / folder)[name].double() for folder in ("pruned", "int8"))
    assert error == pytest.approx(((restored - weight).norm() / weight.norm()).item())
    words = f"rounded to int8, with a bfloat16 scale for each row and {GROUP} columns: relative root mean square error"
    for folder, format in (("int8", "their kept weights are rounded"), ("int8-unpacked", "the format is dense")):
        card, page = ((folders / folder / name).read_text() for name in ("README.md", "report.html"))
        assert words in card
        assert format in card
        assert words in " ".join(page.split())
        assert "bit for bit" not in card
        assert not (folders / folder / "evaluation.json").exists()  # it was of the model before
        inspection = inspect(InspectConfig(model=folders / folder, dense=folders / "dense"))
        assert inspection.rounding == after.rounding
        show_inspection(inspection)
        assert words in " ".join(capsys.readouterr().out.split())


def test_reports_say_that_a_rounded_copy_is_another_model(folders: Path, tmp_path: Path, capsys: Any) -> None:
    packed = pack(PackConfig(model=folders / "pruned", output=tmp_path / "packed", values="int8"))
    unpacked = unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert packed.rounding == unpacked.rounding
    assert packed.packed == unpacked.packed == {"2:4": 14}
    for report, words in ((packed, "another model than the one packed"), (unpacked, "not the model that was packed")):
        show_packing(report, unpacks=report is unpacked)
        assert words in " ".join(capsys.readouterr().out.split())
    assert contents(tmp_path / "packed") == contents(folders / "int8")


def test_inspect_allows_for_the_rounding_and_for_nothing_else(folders: Path, tmp_path: Path) -> None:
    unpacked = shutil.copytree(folders / "int8-unpacked", tmp_path / "unpacked")
    shard = shard_with(unpacked, UP)
    tensors = load_file(shard)
    kept = (tensors[UP].view(-1) != 0).nonzero()[7]
    tensors[UP].view(torch.int16).view(-1)[kept] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    problems = inspect(InspectConfig(model=unpacked, dense=folders / "dense")).problems
    assert f"{UP} differs from the dense model in 1 kept weights" in problems
    (unpacked / "barber.json").unlink()  # nothing says any more that it is rounded
    problems = inspect(InspectConfig(model=unpacked, dense=folders / "dense")).problems
    assert sum("differs from the dense model" in problem for problem in problems) == 14


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_records_of_earlier_programs_name_the_unpacked_files(folders: Path, tmp_path: Path, values: str) -> None:
    """They are verified, and unpacked to the same files."""
    packed = shutil.copytree(folders / values, tmp_path / "packed")
    shutil.copy(folders / f"{values}-unpacked" / "barber.json", packed)
    load(packed, verify=True)
    unpack(PackConfig(model=packed, output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(folders / f"{values}-unpacked")
    shard = shard_with(packed, f"{UP}.packed_values")
    tensors, table = shard_parts(shard)
    tensors["model.norm.weight" if "model.norm.weight" in tensors else f"{UP}.packed_values"].view(-1)[0] += 1
    save_file(tensors, shard, {TABLE_KEY: json.dumps(table)})
    with pytest.raises((ModelError, VerificationError), match="has changed since it was written"):
        load(packed, verify=True)


def test_a_header_that_an_earlier_program_kept_is_ignored(folders: Path, tmp_path: Path) -> None:
    packed = shutil.copytree(folders / "exact", tmp_path / "packed")
    shutil.copy(folders / "pruned" / "barber.json", packed)
    shard = min(packed.glob("packed-*.safetensors"))
    tensors, table = shard_parts(shard)
    save_file(tensors, shard, {TABLE_KEY: json.dumps({**table, "header": "{}"})})
    unpack(PackConfig(model=packed, output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(folders / "pruned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoints_of_other_programs(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tensors and metadata come back, and config.json with its white space."""
    model = make_model(tmp_path / "dense", "llama", dtype=dtype)
    config = json.dumps(json.loads((model / "config.json").read_text()), indent=5) + "  \n\n"
    (model / "config.json").write_text(config)
    tensors, metadata = load_file(model / "model.safetensors"), {f"key {number}": "“value”" for number in range(9)}
    tensors[UP][torch.rand(tensors[UP].shape) < 0.7] = 0
    save_file(tensors, model / "model.safetensors", metadata)
    for values in ("exact", "int8"):
        report = pack(PackConfig(model=model, output=tmp_path / values, values=values))
        assert report.packed == {"bitmask": 1}
        assert (report.rounding is None) == (values == "exact")
        unpack(PackConfig(model=tmp_path / values, output=tmp_path / f"{values}-unpacked"))
        assert (tmp_path / f"{values}-unpacked" / "config.json").read_text() == config
        with safe_open(tmp_path / f"{values}-unpacked" / "model.safetensors", "pt") as handle:
            assert handle.metadata() == metadata
        for name, tensor in read(tmp_path / f"{values}-unpacked").items():
            assert torch.equal(tensor, tensors[name]) == (values == "exact" or name != UP)


@pytest.mark.parametrize(("family", "stacks"), [("granitemoe", 4), ("gpt_oss", 4), ("gpt2", 0)])
def test_stacked_and_transposed_weights(tmp_path: Path, family: str, stacks: int) -> None:
    model, tokens = make_model(tmp_path / "dense", family), save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"initial": "wanda", "rebuild": False, "report": False, "dtype": "float32"}
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, sparsity=0.7, **settings))
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "packed"))
    source = CheckpointSource(tmp_path / "packed")
    entries = [entry for table in source.packed.values() for entry in table.packed.values()]
    assert sum(len(entry.shape) == 3 for entry in entries) == stacks
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert contents(tmp_path / "unpacked") == contents(tmp_path / "pruned")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        for keep_packed in (False, True):
            logits = load(tmp_path / "packed", keep_packed=keep_packed)(IDS).logits
            torch.testing.assert_close(logits, expected(IDS).logits, rtol=1e-4 * keep_packed, atol=1e-4 * keep_packed)
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "rounded", values="int8"))
    assert inspect(InspectConfig(model=tmp_path / "rounded", dense=model)).problems == ()


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path, folders: Path) -> None:
    left = shutil.copytree(folders / "exact", tmp_path / "again.partial")  # all but the rename
    (left / LOCK_NAME).touch()
    (left / "packed-more.safetensors").write_bytes(b"half a shard")
    pack(PackConfig(model=folders / "pruned", output=tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(folders / "exact")
    assert not left.exists()


def test_a_model_that_is_not_pruned_is_packed_with_a_warning(tmp_path: Path, llama: Path) -> None:
    listener = Listener()
    report = pack(PackConfig(model=str(llama), output=tmp_path / "packed"), listener)
    assert report.packed == {}
    assert listener.warnings == [f"{llama} has no matrix that packing makes smaller: is it pruned?"]


@pytest.mark.parametrize(
    ("command", "model", "values", "problem", "hint"),
    [
        (unpack, "pruned", "exact", "is not packed", "llm-barber pack"),
        (unpack, "int8", "int8", "pack alone", "from the files"),
        (pack, "exact", "exact", "is packed already", "llm-barber unpack"),
        (pack, "dense", "int8", "no matrix of .* is pruned", "llm-barber prune"),
        (pack, "int8-unpacked", "int8", "rounded already", "without --values int8"),
    ],
)
def test_models_that_are_not_for_the_command(
    folders: Path, tmp_path: Path, command: Any, model: str, values: str, problem: str, hint: str
) -> None:
    with pytest.raises((ModelError, SettingsError), match=problem) as caught:
        command(PackConfig(model=folders / model, output=tmp_path / "out", values=values))
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_settings_and_outputs_that_are_refused(folders: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        pack(PackConfig(model=folders / "pruned", output=folders / "exact"))
    with pytest.raises(SettingsError, match="is PRUNED"):
        PackConfig(model=folders / "pruned", output=folders / "pruned" / "." / "x" / "..", overwrite=True)
    with pytest.raises(SettingsError, match="contains PRUNED"):
        PackConfig(model=folders / "pruned", output=folders, overwrite=True)
    with pytest.raises(SettingsError, match="int4"):
        PackConfig(model=folders / "pruned", output=folders / "out", values="int4")


def shard_parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as handle:
        return load_file(path), json.loads(handle.metadata()[TABLE_KEY])


def test_a_folder_whose_files_do_not_fit_together_is_refused(folders: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    index = json.loads((folders / "exact" / PACKED_INDEX).read_text())
    shard = min((folders / "exact").glob("packed-model*")).name
    tensors, table = shard_parts(folders / "exact" / shard)

    def write(name: str, text: str) -> Any:
        return lambda: (packed / name).write_text(text)

    def save(**changes: Any) -> Any:
        return lambda: save_file(tensors, packed / shard, {TABLE_KEY: json.dumps({**table, **changes})})

    for change, problem in (
        (write(PACKED_INDEX, json.dumps({**index, "version": 3})), "has format version 3"),
        (write(PACKED_INDEX, json.dumps({**index, "version": 2})), "version 1, packed.index.json has 2"),
        (write(PACKED_INDEX, json.dumps({**index, "weight_map": {"a": "../../etc/passwd"}})), "not a file of its"),
        (write(PACKED_INDEX, "[" * 100_000), "cannot be read"),
        (lambda: (packed / shard).unlink(), "is missing"),
        (lambda: shutil.copy(packed / shard, packed / "packed-more.safetensors"), "does not list packed-more"),
        (lambda: (packed / PACKED_INDEX).unlink(), r"has no packed\.index\.json, though its config\.json"),
        (lambda: save_file(tensors, packed / shard), "no table of packed weights"),
        (save(file="a\0.safetensors"), "which is not a file of its folder"),
        (save(file="model-00002-of-00003.safetensors"), "name the same dense file"),
    ):
        shutil.copytree(folders / "exact", packed)
        change()
        with pytest.raises(ModelError, match=problem) as caught:
            unpack(PackConfig(model=packed, output=tmp_path / "out"))
        assert caught.value.hint
        assert not (tmp_path / "out").exists()
        shutil.rmtree(packed)


def test_a_rounded_table_that_does_not_fit_is_refused(folders: Path, tmp_path: Path) -> None:
    """Every claim of the table, changed with a digest that fits, in a folder without a record."""
    copy = shutil.copytree(folders / "int8", tmp_path / "copy")
    (copy / "barber.json").unlink()
    shard = shard_with(copy, f"{UP}.packed_scales")
    tensors, table = shard_parts(shard)
    scales, values = tensors[f"{UP}.packed_scales"], tensors[f"{UP}.packed_values"]

    def entry(**changes: Any) -> dict[str, Any]:
        return {"packed": {**table["packed"], UP: {**table["packed"][UP], **changes}}}

    def part(suffix: str, tensor: Tensor) -> dict[str, Tensor]:
        return {**tensors, UP + suffix: tensor}

    changed = {name: {**stored, "sha256": "0" * 64} for name, stored in table["tensors"].items()}
    others = {name: value for name, value in table["packed"].items() if name != UP}
    cases: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [
        ("damaged", entry(group=0), tensors),
        ("damaged", entry(group=2**64 + 128), tensors),  # 128 in the 64 bits that C has for it
        ("damaged", entry(error=-1.0), tensors),
        ("damaged", entry(error="NaN"), tensors),
        ("damaged", entry(dtype="F64"), tensors),
        ("damaged", entry(unknown=1), tensors),
        ("scales", entry(group=8), tensors),
        ("which do not fit its shape", entry(shape=[2**20, 2**20]), tensors),
        ("not in its table", {"packed": others}, tensors),
        ("other tensors", {"tensors": {}}, tensors),
        ("has changed since it was written", {"tensors": changed}, tensors),
        ("scales", {}, part(".packed_scales", scales.float())),
        ("scales", {}, part(".packed_scales", scales[:-1].contiguous())),
        ("not rounded", {}, part(".packed_values", values.view(torch.uint8))),
        ("lacks a part", {}, {name: part for name, part in tensors.items() if name != f"{UP}.packed_scales"}),
        ("has changed", {}, part(".packed_values", values.flip(0))),
    ]
    for problem, changes, parts in cases:
        save_file(parts, shard, {TABLE_KEY: json.dumps(with_digest({**table, **changes}))})
        with pytest.raises(ModelError, match=problem) as caught:
            read(copy)
        assert caught.value.hint
    save_file(tensors, shard, {TABLE_KEY: json.dumps({**table, "file": "other.safetensors"})})
    with pytest.raises(ModelError, match="damaged"):  # the digest does not fit
        read(copy)


def test_a_record_with_another_rounding_is_refused(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders / "int8", tmp_path / "copy")
    record = json.loads((copy / "barber.json").read_text())
    record["rounding"]["errors"] = {UP: 0.0}  # an error that is too good, in a record whose digest fits
    (copy / "barber.json").write_text(json.dumps(with_digest(record)))
    with pytest.raises(VerificationError, match="another rounding"):
        load(copy, verify=True)


@pytest.mark.parametrize(("values", "least"), [("exact", 450), ("int8", 900)])
def test_fuzzed_files_are_refused_or_read(tmp_path: Path, values: str, least: int) -> None:
    """Exact values have no checksums without a record; rounded ones are refused, or the change has no meaning."""
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 8}
    model = make_model(tmp_path / "dense", "llama", **small)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "_proj" in name:
            tensor[torch.rand(tensor.shape) < 0.6] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    pack(PackConfig(model=model, output=tmp_path / "packed", values=values))
    expected = read(tmp_path / "packed")
    files = [tmp_path / "packed" / PACKED_INDEX, tmp_path / "packed" / "packed-model.safetensors"]
    generator = random.Random(0)
    refused = 0
    for number in range(1000):
        original = files[number % 2].read_bytes()
        files[number % 2].write_bytes(damaged(original, generator, first=4000))
        try:
            actual = read(tmp_path / "packed")
            assert sum(tensor.numel() for tensor in actual.values()) < 10_000
            assert values == "exact" or all(torch.equal(actual[name], expected[name]) for name in expected)
        except ModelError:
            refused += 1
        files[number % 2].write_bytes(original)
    assert least < refused < 1000


@pytest.mark.parametrize(
    "plain",
    [
        b"{}",
        b"{ }\n",
        b'{"a":1}',
        b'{"a": 1 }\r\n',
        b'{\n  "quantization_config": null\n}\n',  # the last of two keys counts
        b'{"a": "}", "b": {"c": []}}',
        b'{"a": ",\\n  \\"quantization_config\\": {}"}',
    ],
)
def test_the_entry_in_a_configuration_comes_out_as_it_went_in(plain: bytes) -> None:
    shards = ["packed-b.safetensors", "packed-a.safetensors"]
    packed = packed_configuration(plain, shards)
    assert json.loads(packed)[KEY]["weights"] == shards[1]
    assert names_packed(json.loads(packed))
    assert packed_configuration(packed, shards) == packed  # a second entry is not added
    assert plain_configuration(packed) == plain_configuration(plain) == plain
    anew = json.dumps({**json.loads(packed), "more": 2}).encode()  # not the last any more
    assert KEY not in json.loads(plain_configuration(anew))


@pytest.mark.parametrize(
    "content", [b"", b"}", b"{", b"[]", b"\xff\xfe}", b'{"quantization_config": {"quant_method": "gptq"}}']
)
def test_a_configuration_without_the_entry_stays_as_it_is(content: bytes) -> None:
    assert plain_configuration(content) == content


def test_a_dense_folder_that_calls_itself_packed_is_refused(llama: Path) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": "llm-barber"})
    with pytest.raises(ModelError, match=r"has no packed\.index\.json, though its config\.json"):
        CheckpointSource(llama)
