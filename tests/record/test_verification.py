"""Changes of records, folders, packed folders and finished outputs are found."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, PackConfig, PruneConfig, RebuildConfig, inspect, pack, prune, rebuild, unpack
from llm_barber.checkpoint import hub
from llm_barber.checkpoint.digests import content_digest, has_its_digest, with_digest
from llm_barber.checkpoint.packed_format import PLACES, VALUES
from llm_barber.comparison.cells import fingerprint
from llm_barber.errors import BarberError, ModelError, OutputError, VerificationError
from llm_barber.run import stream as run_module
from llm_barber.runtime.load import load
from tests.conftest import Listener, change_json, make_model, save_tokens
from tests.helpers.text import add_tokenizer

SETTINGS: dict[str, Any] = {"initial": "wanda", "report": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the pruned model, and the packed model; tests do not change them."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model(folder / "dense", "llama", dtype=torch.bfloat16)
    add_tokenizer(model)
    tokens = save_tokens(folder / "tokens.safetensors")
    prune(PruneConfig(model=model, output=folder / "pruned", calibration=tokens, pattern="2:4", **SETTINGS))
    pack(PackConfig(model=folder / "pruned", output=folder / "packed"))
    return folder


@pytest.fixture
def folders(models: Path, tmp_path: Path) -> Path:
    """Copies of the models, to change; files keep their times."""
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def problems(folder: Path) -> str:
    return "; ".join(inspect(InspectConfig(model=folder)).problems)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_digest_covers_all_but_itself() -> None:
    assert content_digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    content = with_digest({"b": [1.5, None], "a": "ä"})
    assert [*content] == ["b", "a", "digest"]
    assert has_its_digest({name: content[name] for name in reversed(content)})
    assert not has_its_digest({**content, "a": "a"})
    assert not has_its_digest({**content, "c": 1})
    assert not has_its_digest({"a": 1})


@pytest.mark.parametrize("suffix", [VALUES, PLACES])
def test_a_bit_that_flips_in_a_packed_weight_is_found(folders: Path, suffix: str) -> None:
    packed, shard = folders / "packed", next((folders / "packed").glob("packed-model-00002*"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(suffix))
    content = shard.read_bytes()
    position = content.index(tensors[name].view(torch.uint8).numpy().tobytes())
    shard.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert "packed-model-00002-of-00003.safetensors has changed since it was written (sha256)" in problems(packed)
    with pytest.raises(VerificationError, match=r"model-00002-of-00003.safetensors has changed since"):
        unpack(PackConfig(model=packed, output=folders / "unpacked"))
    assert not (folders / "unpacked").exists()
    assert not (folders / "unpacked.partial").exists()


def test_a_packed_folder_that_was_changed_never_unpacks_to_other_files(models: Path, tmp_path: Path) -> None:
    """After any bit of any file flips, the folder is refused, or it unpacks to the same files."""
    expected = contents(models / "pruned")
    exempt = {"README.md", "report.html"}
    generator = random.Random(35)
    names = sorted(path.name for path in (models / "packed").iterdir() if path.name not in exempt)
    for number in range(60):
        packed, out = tmp_path / "packed", tmp_path / f"out{number}"
        shutil.copytree(models / "packed", packed)
        name = names[number % len(names)]
        flip(packed / name, generator.randrange(2**40))
        noticed = True
        try:
            noticed = bool(problems(packed))
            unpack(PackConfig(model=packed, output=out))
        except BarberError:
            assert not out.exists()
        else:
            assert contents(out) == expected, name
            assert not noticed or name == "config.json"  # its entry for transformers is not unpacked
        shutil.rmtree(packed)


@pytest.mark.parametrize("kind", ["pruned", "packed"])
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_json(folder / "config.json", rms_norm_eps=1.0),
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        lambda folder: (folder / "model-00009-of-00009.safetensors").write_bytes(b""),
        lambda folder: (folder / "modeling_llama.py").write_text("import os"),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        lambda folder: (folder / "extra").mkdir(),
        lambda folder: next(folder.glob("*.index.json")).write_text(
            next(folder.glob("*.index.json")).read_text().replace("{", "{ ", 1)
        ),
    ],
    ids=["config", "tokenizer", "tokens", "shard", "code", "pickle", "folder", "index"],
)
def test_every_changed_or_added_entry_is_found(folders: Path, kind: str, change: Callable[[Path], Any]) -> None:
    assert problems(folders / kind) == ""
    change(folders / kind)
    assert problems(folders / kind)
    if kind == "pruned":
        with pytest.raises(BarberError):
            pack(PackConfig(model=folders / kind, output=folders / "other"))
        return
    with suppress(BarberError):
        unpack(PackConfig(model=folders / kind, output=folders / "other"))
        assert contents(folders / "other") == contents(folders / "pruned")  # added files do not travel


def test_load_verifies_on_request(folders: Path) -> None:
    for kind in ("pruned", "packed"):
        load(folders / kind, verify=True)
        change_json(folders / kind / "generation_config.json", pad_token_id=7)
        load(folders / kind)
        with pytest.raises(VerificationError, match="generation_config.json has changed since it was written"):
            load(folders / kind, verify=True)
    with pytest.raises(ModelError, match=r"has no barber\.json"):
        load(folders / "dense", verify=True)


def test_an_edited_total_size_is_found(folders: Path) -> None:
    index = folders / "pruned" / "model.safetensors.index.json"
    change_json(index, metadata={"total_size": 1})
    assert problems(folders / "pruned") == "model.safetensors.index.json has changed since it was written (sha256)"


def test_files_of_other_tools_are_no_problem(folders: Path) -> None:
    for kind in ("pruned", "packed"):
        (folders / kind / ".gitattributes").write_text("")
        (folders / kind / ".cache").mkdir()
        (folders / kind / "README.md").write_text("a card of my own")
        (folders / kind / "evaluation.json").write_text("{}")
        assert problems(folders / kind) == ""


def set_first_linear(record: dict[str, Any], **changes: Any) -> None:
    record["layers"][0]["blocks"][0]["linears"][0].update(changes)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(method="sparsegpt"),
        lambda record: record["calibration"].update(sha256="0" * 64),
        lambda record: record.update(unknown=1),
        lambda record: record.update(kept_weights="tune"),
        lambda record: record.update(sparsity=0.6),
        lambda record: set_first_linear(record, pruned=511),
        lambda record: record.pop("files"),
        lambda record: record.pop("digest"),
        lambda record: record.update(digest="0" * 64),
    ],
)
def test_an_edited_record_is_refused(folders: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folders / "pruned" / "barber.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ModelError, match="its digest does not fit"):
        problems(folders / "pruned")
    with pytest.raises(ModelError, match="its digest does not fit"):
        pack(PackConfig(model=folders / "pruned", output=folders / "other"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(unknown=1),
        lambda record: record.update(sparsity=0.6),
        lambda record: set_first_linear(record, unknown=1),
        lambda record: set_first_linear(record, sparsity=0.6),
        lambda record: set_first_linear(record, pruned=-1),
        lambda record: set_first_linear(record, pruned=10**9),
        lambda record: set_first_linear(record, pruned=513),  # of 512 zeros
        lambda record: set_first_linear(record, grown=10**9),
    ],
)
def test_a_record_with_unknown_or_impossible_fields_is_refused(
    folders: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    """Edited records with a digest that fits."""
    path = folders / "pruned" / "barber.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(with_digest(record)))
    with pytest.raises(ModelError, match="is not a record of this program"):
        problems(folders / "pruned")


def test_zeros_that_neither_mask_nor_dense_model_explain_are_found(folders: Path) -> None:
    path = folders / "pruned" / "barber.json"
    record = json.loads(path.read_text())
    set_first_linear(record, pruned=500, sparsity=500 / 1024)
    linears = [linear for layer in record["layers"] for block in layer["blocks"] for linear in block["linears"]]
    shapes = [linear["shape"][0] * linear["shape"][1] for linear in linears]
    record["sparsity"] = sum(linear["pruned"] for linear in linears) / sum(shapes)
    path.write_text(json.dumps(with_digest(record)))
    config = InspectConfig(model=folders / "pruned", dense=str(folders / "dense"))
    assert inspect(config).problems == (
        "layer 0 self_attn.q_proj has 12 zeros that neither its mask nor the dense model has",
    )


def run(folders: Path, progress: Listener | None = None, **settings: Any) -> Any:
    config = PruneConfig(
        model=folders / "dense", output=folders / "pruned", calibration=folders / "tokens.safetensors", pattern="2:4",
        **{**SETTINGS, "resume": True, **settings},
    )  # fmt: skip
    return prune(config, progress)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    add_tokenizer(model)
    save_tokens(tmp_path / "tokens.safetensors")
    run(tmp_path)
    return tmp_path


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("damage", ["gone", "flipped", "config", "record", "record gone"])
def test_a_finished_output_is_checked_when_it_is_resumed(finished: Path, damage: str, format: str) -> None:
    out, settings = finished / "pruned", {"format": format}
    if format == "packed":
        run(finished, format="packed", overwrite=True, resume=False)
    listener = Listener()
    run(finished, listener, **settings)
    assert [warning for warning in listener.warnings if "nothing is left to do" in warning]
    shard = sorted(out.glob("*.safetensors"))[-1]
    expected = contents(out)
    if damage == "gone":
        shard.unlink()
    elif damage == "flipped":
        flip(shard, 8 * (shard.stat().st_size - 3))
    elif damage == "config":
        change_json(out / "config.json", rms_norm_eps=1.0)
    elif damage == "record":
        (out / "barber.json").write_text((out / "barber.json").read_text().replace("wanda", "magnitude"))
    else:
        (out / "barber.json").unlink()
    with pytest.raises(OutputError, match="was complete, but|digest does not fit|exists"):
        run(finished, **settings)
    run(finished, overwrite=True, **settings)  # prunes again
    timed = ("barber.json", "README.md")
    assert {name: (out / name).read_bytes() for name in expected if name not in timed} == {
        name: content for name, content in expected.items() if name not in timed
    }


def test_a_model_rewritten_after_the_run_is_reported(finished: Path) -> None:
    os.utime(finished / "dense" / "model.safetensors", ns=(1, 1))
    listener = Listener()
    run(finished, listener)
    assert [
        warning for warning in listener.warnings if warning.startswith("model.safetensors of the model was modified")
    ]
    tensors = load_file(finished / "dense" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, finished / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="was made with other files of"):
        run(finished)


def test_an_evaluation_beside_a_model_changes_nothing_for_a_run(finished: Path) -> None:
    for name in ("evaluation.json", "report.html", "README.md", "unrelated.safetensors"):
        (finished / "dense" / name).write_text("{}")
    listener = Listener()
    run(finished, listener)
    assert [warning for warning in listener.warnings if "nothing is left to do" in warning]
    (finished / "dense" / "generation_config.json").write_text("{}")  # a file that is copied to the output
    with pytest.raises(OutputError, match="was made with other files of"):
        run(finished)


def rebuild_in(folder: Path, progress: Listener | None = None) -> None:
    config = RebuildConfig(
        dense=folder / "dense", pruned=folder / "pruned", output=folder / "rebuilt", resume=True, report=False,
        calibration=folder / "tokens.safetensors", dtype="float32",
    )  # fmt: skip
    rebuild(config, progress)


def test_an_evaluation_beside_the_pruned_model_breaks_no_killed_rebuild(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate PRUNED` writes an evaluation between the kill and `--resume`."""
    prune_layer = run_module.prune_layer

    def stop(job: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return prune_layer(job, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "prune_layer", stop)
        rebuild_in(finished)
    before = fingerprint(finished / "pruned")
    (finished / "pruned" / "evaluation.json").write_text("{}")
    assert fingerprint(finished / "pruned") == before  # `compare` recognises a model by it
    rebuild_in(finished)
    assert problems(finished / "rebuilt") == ""


def test_a_finished_rebuild_checks_the_pruned_model(finished: Path) -> None:
    rebuild_in(finished)
    (finished / "pruned" / "evaluation.json").write_text("{}")  # `evaluate` keeps it there
    listener = Listener()
    rebuild_in(finished, listener)
    assert [warning for warning in listener.warnings if "nothing is left to do" in warning]
    shard = next((finished / "pruned").glob("model-00002*"))
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(OutputError, match=r"was made with other files of .*pruned"):
        rebuild_in(finished)


def test_other_files_in_a_finished_output_are_reported(finished: Path) -> None:
    (finished / "pruned" / "modeling.py").write_text("")
    (finished / "tokens.safetensors").rename(finished / "elsewhere")
    listener = Listener()
    run(finished, listener)
    assert [warning for warning in listener.warnings if "modeling.py is in the folder, not in the record" in warning]
    assert [warning for warning in listener.warnings if "calibration text of" in warning]
    (finished / "dense").rename(finished / "moved")
    listener = Listener()
    run(finished, listener)
    assert [warning for warning in listener.warnings if "dense is not there any more" in warning]


def test_inspect_opens_each_model_at_its_revision(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {("o/pruned", "p"): models / "pruned", ("o/dense", "d"): models / "dense"}
    monkeypatch.setattr(hub, "_download", lambda name, revision, _: folders[name, revision])
    config = InspectConfig(model="o/pruned", revision="p", dense="o/dense", dense_revision="d")
    assert inspect(config).problems == ()


def test_a_licence_that_is_a_pipe_is_refused(folders: Path) -> None:
    os.mkfifo(folders / "packed" / "LICENSE")
    (folders / "packed" / "barber.json").unlink()
    with pytest.raises(ModelError, match="LICENSE is a named pipe"):
        unpack(PackConfig(model=folders / "packed", output=folders / "unpacked"))
