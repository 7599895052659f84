"""Headers of the dense files that a packed folder unpacks to."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, PackConfig, PruneConfig, inspect, pack, prune, unpack
from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.checkpoint.packed_table import TABLE_KEY
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.record.file import read_record
from tests.conftest import make_model, save_tokens

METADATA = {f"key {number}": f"“value” {number}" for number in (3, 1, 4, 5, 9, 2, 6)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headers")
    model = make_model(folder / "model", "llama", dtype=torch.bfloat16)
    tokens = save_tokens(folder / "tokens.safetensors")
    settings = {"calibration": tokens, "sparsity": 0.5, "initial": "wanda", "rebuild": False, "report": False}
    prune(PruneConfig(model=model, output=folder / "pruned", **settings))
    return folder / "pruned"


@pytest.fixture
def pruned(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pruned"))


def compact(content: dict[str, Any]) -> str:
    """JSON as safetensors writes it."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def rewrite_header(file: Path, metadata: dict[str, str] | None, layout: str) -> bytes:
    """Write a safetensors file anew with another header; its content."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    data = content[end:]
    if layout == "reversed":  # tensors in another order, as other programs write them
        parts = {name: data[slice(*header[name]["data_offsets"])] for name in sorted(header, reverse=True)}
        position, ordered = 0, {}
        for name, part in parts.items():
            ordered[name] = {**header[name], "data_offsets": [position, position + len(part)]}
            position += len(part)
        header, data = ordered, b"".join(parts.values())
    whole = header if metadata is None else {"__metadata__": metadata, **header}
    text = (json.dumps(whole, indent=1) if layout == "indented" else compact(whole)).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file.read_bytes()


@pytest.mark.parametrize(
    ("metadata", "layout", "values"),
    [
        (METADATA, "compact", "exact"),
        (METADATA, "reversed", "int8"),
        (dict(reversed(METADATA.items())), "indented", "exact"),
        ({"format": "pt"}, "compact", "exact"),
        ({"format": "pt"}, "reversed", "exact"),
        ({}, "compact", "exact"),
        (None, "compact", "exact"),
        (None, "indented", "int8"),
    ],
)
def test_headers_come_back_as_they_were(
    tmp_path: Path, pruned: Path, metadata: dict[str, str] | None, layout: str, values: str
) -> None:
    """safetensors itself writes several keys in random order."""
    file = sorted(pruned.glob("model-*.safetensors"))[1]
    expected = rewrite_header(file, metadata, layout)
    change_record(pruned, file.name, hashlib.sha256(expected).hexdigest())
    pack(PackConfig(model=pruned, output=tmp_path / "packed", values=values))
    assert inspect(InspectConfig(model=tmp_path / "packed")).problems == ()
    unpack(PackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    unpacked = (tmp_path / "unpacked" / file.name).read_bytes()
    end = 8 + int.from_bytes(expected[:8], "little")
    assert unpacked[:end] == expected[:end]
    if values == "exact":
        assert unpacked == expected
    assert load_file(tmp_path / "unpacked" / file.name).keys() == load_file(file).keys()
    with safe_open(tmp_path / "packed" / f"packed-{file.name}", "pt") as handle:
        kept = "header" in json.loads(handle.metadata()[TABLE_KEY])
    writes_the_same = layout == "compact" and metadata is not None and len(metadata) < 2
    assert kept is not writes_the_same


def change_record(folder: Path, file: str, digest: str) -> None:
    """Let a folder's record name another digest of a file."""
    record = read_record(folder)
    assert record is not None
    changed = record.model_copy(update={"files": {**record.files, file: digest}})
    (folder / RECORD_NAME).write_text(changed.to_json())


def test_a_kept_header_that_does_not_fit_is_refused(tmp_path: Path, pruned: Path) -> None:
    file = sorted(pruned.glob("model-*.safetensors"))[1]
    rewrite_header(file, METADATA, "compact")
    (pruned / RECORD_NAME).unlink()
    pack(PackConfig(model=pruned, output=tmp_path / "packed"))
    shard = tmp_path / "packed" / f"packed-{file.name}"
    tensors = load_file(shard)
    with safe_open(shard, "pt") as handle:
        table = json.loads(handle.metadata()[TABLE_KEY])
    header = json.loads(table["header"])
    name, other = [name for name in header if name != "__metadata__"][:2]
    entry = header[name]
    first, last = entry["data_offsets"]
    for changed in (
        "[]", "{", '{"a": 1, "a": 1}', {**header, "__metadata__": {}}, {**header, "more": entry},
        {key: value for key, value in header.items() if key != name}, {**header, name: []},
        {**header, name: {**entry, "dtype": "F32"}}, {**header, name: {**entry, "shape": [1]}},
        {**header, name: {**entry, "shape": [float(side) for side in entry["shape"]]}},
        {**header, name: {**entry, "data_offsets": [first]}}, {**header, name: {**entry, "more": 1}},
        {**header, name: {**entry, "data_offsets": [first, 2**70]}},
        {**header, name: {**entry, "data_offsets": [first + 2**40, last + 2**40]}},
        {**header, name: {**entry, "data_offsets": header[other]["data_offsets"]}},
    ):  # fmt: skip
        text = changed if isinstance(changed, str) else json.dumps(changed)
        save_file(tensors, shard, {TABLE_KEY: json.dumps({**table, "header": text})})
        with pytest.raises(ModelError, match="the dense header that packed-"):
            CheckpointSource(tmp_path / "packed")
    save_file(tensors, shard, {TABLE_KEY: json.dumps(table)})
    CheckpointSource(tmp_path / "packed")
