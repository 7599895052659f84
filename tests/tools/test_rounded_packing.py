"""Packed checkpoints with values rounded to int8: what they unpack to, what says so, and damaged ones."""

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

from llm_barber import EvaluateConfig, InspectConfig, PackConfig, PruneConfig, evaluate, inspect, pack, prune, unpack
from llm_barber.checkpoint.digests import with_digest
from llm_barber.checkpoint.index import PACKED_INDEX
from llm_barber.checkpoint.packed_table import TABLE_KEY
from llm_barber.checkpoint.rounding import GROUP, round_trip
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.cli.tables import show_inspection, show_packing
from llm_barber.errors import ModelError, SettingsError, VerificationError
from llm_barber.record.file import read_record
from llm_barber.runtime.load import load
from llm_barber.settings.tools import UnpackConfig
from tests.conftest import make_model, save_tokens
from tests.helpers.damage import damaged
from tests.helpers.text import add_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, `dense`, `pruned`, `packed` in int8, and `unpacked`."""
    folder = tmp_path_factory.mktemp("rounded")
    model = make_model(folder / "dense", "llama", dtype=torch.bfloat16)
    add_tokenizer(model)
    tokens = save_tokens(folder / "tokens.safetensors")
    prune(PruneConfig(model=model, output=folder / "pruned", calibration=tokens, sparsity=0.5, preset="paper"))
    (folder / "pruned" / "evaluation.json").write_text("{}")
    pack(PackConfig(model=folder / "pruned", output=folder / "packed", values="int8"))
    unpack(PackConfig(model=folder / "packed", output=folder / "unpacked"))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    source = CheckpointSource(folder)
    return source.read(source.tensors)


def test_kept_weights_come_back_rounded(folders: Path) -> None:
    pruned, packed, unpacked = (read(folders / name) for name in ("pruned", "packed", "unpacked"))
    linears = [name for name in pruned if "_proj" in name]
    assert len(linears) == 14
    for name, weight in pruned.items():
        expected = round_trip(weight, GROUP) if name in linears else weight
        assert torch.equal(packed[name], expected)
        assert torch.equal(unpacked[name], expected)
        assert torch.equal(packed[name], weight) == (name not in linears)
    assert json.loads((folders / "packed" / PACKED_INDEX).read_text())["version"] == 2
    ids = torch.arange(12)[None]
    with torch.no_grad():
        loaded = load(folders / "packed", verify=True)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded(ids).logits, load(folders / "unpacked", verify=True)(ids).logits)


def test_records_pages_and_cards_say_so(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = read_record(folders / "pruned"), read_record(folders / "packed")
    assert before is not None
    assert after is not None
    assert before.rounding is None
    assert after.rounding is not None
    assert '"rounding"' not in (folders / "pruned" / "barber.json").read_text()
    assert (folders / "unpacked" / "barber.json").read_text() == (folders / "packed" / "barber.json").read_text()
    name, error = after.rounding.largest
    weight = read(folders / "pruned")[name].double()
    restored = read(folders / "packed")[name].double()
    assert error == pytest.approx(((restored - weight).norm() / weight.norm()).item())
    words = f"rounded to int8, with a bfloat16 scale for each row and {GROUP} columns: relative root mean square error"
    for folder in ("packed", "unpacked"):
        card, page = ((folders / folder / name).read_text() for name in ("README.md", "report.html"))
        assert words in card
        assert words in " ".join(page.split())
        assert "bit for bit" not in card
        assert not (folders / folder / "evaluation.json").exists()  # it was of the model before
        inspection = inspect(InspectConfig(model=folders / folder, dense=folders / "dense"))
        assert inspection.problems == ()
        assert inspection.rounding == after.rounding
        show_inspection(inspection)
        shown = " ".join(capsys.readouterr().out.split())
        assert words in shown
        assert "agrees with its record and" in shown
        assert "dense, rounded" in shown
    assert "their kept weights are rounded" in (folders / "packed" / "README.md").read_text()
    assert "the format is dense" in (folders / "unpacked" / "README.md").read_text()


def test_reports_say_that_it_is_another_model(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(PackConfig(model=folders / "pruned", output=tmp_path / "packed", values="int8"))
    unpacked = unpack(UnpackConfig(model=str(tmp_path / "packed"), output=tmp_path / "unpacked"))
    assert packed.rounding is not None
    assert packed.rounding == unpacked.rounding
    for report, words in ((packed, "another model than the one packed"), (unpacked, "not the model that was packed")):
        show_packing(report, unpacks=report is unpacked)
        assert words in " ".join(capsys.readouterr().out.split())
    exact = pack(PackConfig(model=folders / "pruned", output=tmp_path / "exact"))
    assert exact.rounding is None
    sizes = [
        sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())
        for folder in (tmp_path / "packed", tmp_path / "exact", folders / "pruned")
    ]  # without the tables, which are large beside these weights
    assert sizes[0] < sizes[1] < sizes[2]
    for again in ("packed", "unpacked"):
        files = [{path.name: path.read_bytes() for path in (where / again).iterdir()} for where in (folders, tmp_path)]
        assert files[0] == files[1]


def test_changed_weights_are_found(folders: Path, tmp_path: Path) -> None:
    """`inspect --dense` allows for the rounding, and for nothing else."""
    unpacked = shutil.copytree(folders / "unpacked", tmp_path / "unpacked")
    shard = next(path for path in unpacked.glob("*.safetensors") if UP in load_file(path))
    tensors = load_file(shard)
    kept = (tensors[UP].view(-1) != 0).nonzero()[7]
    tensors[UP].view(torch.int16).view(-1)[kept] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    problems = inspect(InspectConfig(model=unpacked, dense=folders / "dense")).problems
    assert f"{UP} differs from the dense model in 1 kept weights" in problems
    (unpacked / "barber.json").unlink()  # nothing says any more that it is rounded
    problems = inspect(InspectConfig(model=unpacked, dense=folders / "dense")).problems
    assert sum("differs from the dense model" in problem for problem in problems) == 14


def test_a_folder_without_a_record_is_packed_too(folders: Path, tmp_path: Path) -> None:
    pruned = shutil.copytree(folders / "pruned", tmp_path / "pruned")
    (pruned / "barber.json").unlink()
    report = pack(PackConfig(model=pruned, output=tmp_path / "packed", values="int8"))
    assert report.rounding is not None
    inspection = inspect(InspectConfig(model=tmp_path / "packed", dense=folders / "dense"))
    assert inspection.rounding == report.rounding
    assert inspection.problems == ()


@pytest.mark.parametrize("family", ["gpt2", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stacked_and_transposed_weights(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "dense", family, dtype=dtype)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"calibration": tokens, "sparsity": 0.7, "dtype": "float32", "initial": "wanda"}
    prune(PruneConfig(model=model, output=tmp_path / "pruned", report=False, rebuild=False, **settings))
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "packed", values="int8"))
    assert inspect(InspectConfig(model=tmp_path / "packed", dense=model)).problems == ()
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert inspect(InspectConfig(model=tmp_path / "unpacked", dense=model)).problems == ()
    assert {tensor.dtype for tensor in read(tmp_path / "unpacked").values()} == {dtype}


def test_it_can_be_evaluated(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("any text, over and over. " * 10)
    settings = {"text": (str(tmp_path / "text.txt"),), "seqlen": 16, "windows": 4}
    results = [evaluate(EvaluateConfig(model=folders / name, **settings)).texts for name in ("packed", "unpacked")]
    assert results[0] == results[1]


def test_bad_input(folders: Path, tmp_path: Path) -> None:
    for model, problem, hint in (
        ("dense", "no matrix of .* is pruned", "llm-barber prune"),
        ("unpacked", "rounded already", "without --values int8"),
        ("packed", "is packed already", "llm-barber unpack"),
    ):
        with pytest.raises(ModelError, match=problem) as caught:
            pack(PackConfig(model=folders / model, output=tmp_path / "out", values="int8"))
        assert hint in (caught.value.hint or "")
        assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="pack alone"):
        unpack(PackConfig(model=folders / "packed", output=tmp_path / "out", values="int8"))
    with pytest.raises(SettingsError, match="int4"):
        PackConfig(model=folders / "pruned", output=tmp_path / "out", values="int4")
    copy = shutil.copytree(folders / "packed", tmp_path / "copy")
    record = json.loads((copy / "barber.json").read_text())
    record["rounding"]["errors"] = {UP: 0.0}  # an error that is too good, in a record whose digest fits
    (copy / "barber.json").write_text(json.dumps(with_digest(record)))
    with pytest.raises(VerificationError, match="another rounding"):
        load(copy, verify=True)


def shard_parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as handle:
        return load_file(path), json.loads(handle.metadata()[TABLE_KEY])


def test_a_table_that_does_not_fit_is_refused(folders: Path, tmp_path: Path) -> None:
    """Every claim of the table, changed with a digest that fits, in a folder without a record."""
    copy = shutil.copytree(folders / "packed", tmp_path / "copy")
    (copy / "barber.json").unlink()
    shard = next(path for path in copy.glob("*.safetensors") if f"{UP}.packed_scales" in load_file(path))
    tensors, table = shard_parts(shard)

    def broken(problem: str, digest: bool = True, parts: dict[str, Tensor] | None = None, **changes: Any) -> None:
        other = {**table, **changes}
        other = with_digest(other) if digest else other
        save_file(parts or tensors, shard, {TABLE_KEY: json.dumps(other)})
        with pytest.raises(ModelError, match=problem) as caught:
            read(copy)
        assert caught.value.hint

    def entry(**changes: Any) -> dict[str, Any]:
        return {**table["packed"], UP: {**table["packed"][UP], **changes}}

    def part(suffix: str, tensor: Tensor) -> dict[str, Any]:
        return {**tensors, UP + suffix: tensor}

    broken("damaged", digest=False, file="other.safetensors")
    broken("damaged", packed=entry(group=0))
    broken("damaged", packed=entry(group=2**64 + 128))  # 128 in the 64 bits that C has for it
    broken("damaged", packed=entry(error=-1.0))
    broken("damaged", packed=entry(error="NaN"))
    broken("damaged", packed=entry(dtype="F64"))
    broken("damaged", packed=entry(unknown=1))
    broken("scales", packed=entry(group=8))
    broken("which do not fit its shape", packed=entry(shape=[2**20, 2**20]))
    broken("not in its table", packed={name: value for name, value in table["packed"].items() if name != UP})
    broken("other tensors", tensors={})
    changed = {name: {**stored, "sha256": "0" * 64} for name, stored in table["tensors"].items()}
    broken("has changed since it was written", tensors=changed)
    scales, values = tensors[f"{UP}.packed_scales"], tensors[f"{UP}.packed_values"]
    broken("scales", parts=part(".packed_scales", scales.float()))
    broken("scales", parts=part(".packed_scales", scales[:-1].contiguous()))
    broken("not rounded", parts=part(".packed_values", values.view(torch.uint8)))
    broken("lacks a part", parts={name: part for name, part in tensors.items() if name != f"{UP}.packed_scales"})
    broken("has changed", parts=part(".packed_values", values.flip(0)))


def test_fuzzed_files_are_refused_or_read(tmp_path: Path) -> None:
    """What is changed at random is refused, unless the change has no meaning: white space, say."""
    model = make_model(
        tmp_path / "dense", "llama", num_hidden_layers=1, hidden_size=8, intermediate_size=16, vocab_size=8
    )
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "_proj" in name:
            tensor[torch.rand(tensor.shape) < 0.6] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    pack(PackConfig(model=model, output=tmp_path / "packed", values="int8"))
    expected = read(tmp_path / "packed")
    files = [tmp_path / "packed" / PACKED_INDEX, tmp_path / "packed" / "packed-model.safetensors"]
    originals = [path.read_bytes() for path in files]
    generator = random.Random(0)
    refused = 0
    for _ in range(2000):
        place = generator.randrange(2)
        content = damaged(originals[place], generator, first=6000)
        files[place].write_bytes(content)
        try:
            actual = read(tmp_path / "packed")
        except ModelError:
            refused += 1
        else:
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
        files[place].write_bytes(originals[place])
    assert refused > 1800
