"""Whatever is in a file, its reader reads it or refuses it with an error that has a hint; nothing else comes out.

FUZZ_EXAMPLES=1000 pytest tests/test_fuzz_readers.py runs longer, and with other changes each time.
"""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm_barber import InspectConfig, PruneConfig, inspect, prune
from llm_barber.checkpoint.companions import EVALUATION_NAME
from llm_barber.checkpoint.hub import INDEX_NAME
from llm_barber.checkpoint.packed_format import PACKED_INDEX
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.state import STATE_NAME, RunState, read_state, write_state
from llm_barber.checkpoint.unfinished import check_key
from llm_barber.comparison.cells import read_stored
from llm_barber.comparison.result import DenseResult
from llm_barber.errors import BarberError
from llm_barber.evaluation.result import Evaluation, TextResult
from llm_barber.evaluation.tasks import find_tasks
from llm_barber.loading.configuration import load_config
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.page.write import write_page
from llm_barber.planning.configuration import read_configuration
from llm_barber.settings.compare import EvaluateConfig
from llm_barber.settings.tools import PackConfig
from llm_barber.text.calibration import read_text, token_shape
from llm_barber.text.windows import windows_of
from llm_barber.tools.convert import PICKLED, PICKLED_INDEX, pickled_files, read_pickled
from llm_barber.tools.packing import pack, unpack
from tests.conftest import make_gguf, make_model, save_tokens
from tests.helpers.shards import split_in_two_shards
from tests.helpers.text import add_tokenizer

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 95, "num_attention_heads": 2}
EVALUATION = Evaluation(
    model="m", against="d", device="cpu", dtype="float32", versions={"torch": "2"},
    texts=(TextResult(text="t", perplexity=9, windows=1, seqlen=8, begins_with_bos=True, sha256="", against=None),),
)  # fmt: skip
KEY = {"given": {"seed": 1}, "settings": {"seed": 1}, "model's files": "a"}
VALUES = [
    None, True, -1, 0, 1, 2**70, 10**400, 1.5, float("nan"), float("inf"), "", "x", "a\0b", "\ud800", "../x", "0:4",
    "2:4", "x" * 300, [], [0], ["x"], [[]], {}, {"x": "x"}, "~nobody-here/x",
]  # fmt: skip
BYTES = [b"\0", b"\xff", b'"', b"{", b"}", b"[" * 5000, b"[" * 100_000, b"9" * 20, b"-", b"1e999", b"NaN", b"\\ud800"]


@dataclass(frozen=True)
class Reader:
    """A file that is changed, and what reads it."""

    file: Path
    read: Callable[[], object]
    kind: str = "bytes"  # or json, lines, safetensors
    share: float = 1  # of the usual number of changes: some readers are slow


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes are changed, cut off, repeated or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(len(changed) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0 if changed:
                changed[position] ^= draw(st.integers(1, 255))
            case 1:
                del changed[position:]
            case 2:
                del changed[position : position + draw(st.integers(1, 20))]
            case 3:
                changed[position:position] = changed[position : position + draw(st.integers(1, 200))]
            case _:
                changed[position:position] = draw(st.sampled_from(BYTES))
    return bytes(changed)


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    paths = []
    for key, value in items:
        paths.append((*path, key))
        if isinstance(value, dict | list):
            paths += paths_of(value, (*path, key))
    return paths


@st.composite
def changed_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Keys are dropped or renamed, values replaced by others, keys written twice; or bytes are changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(content))
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        if not (paths := paths_of(document)):
            break
        *path, key = draw(st.sampled_from(paths))
        owner = document
        for step in path:
            owner = owner[step]
        match draw(st.integers(0, 4)):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[draw(st.sampled_from(["", "a\0b", "\ud800", "x", "../x"]))] = owner.pop(key)
            case _:
                owner[key] = deepcopy(draw(st.sampled_from(VALUES)))
    text = json.dumps(document)
    if draw(st.integers(0, 7)) == 0 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # each key twice
    return text.encode()


@st.composite
def changed(draw: st.DrawFn, content: bytes, kind: str) -> bytes:
    """Content changed as a file of its kind is damaged, or written by somebody else."""
    match kind:
        case "json":
            return draw(changed_json(content))
        case "lines":
            lines = content.split(b"\n")
            number = draw(st.integers(0, len(lines) - 2))
            lines[number] = draw(changed_json(lines[number]))
            return b"\n".join(lines)
        case "safetensors" if draw(st.booleans()):
            size = int.from_bytes(content[:8], "little")
            header = draw(changed_json(content[8 : 8 + size].strip()))
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return draw(changed_bytes(content))


def read_model(folder: Path) -> None:
    """Open a model as `prune` does, and read it as `inspect` does."""
    source = CheckpointSource(folder)
    read_configuration(str(folder))
    load_config(source)
    inspect(InspectConfig(model=str(folder)))


def read_packed(folder: Path) -> None:
    shutil.rmtree(folder.parent / "unpacked", ignore_errors=True)
    unpack(PackConfig(model=str(folder), output=folder.parent / "unpacked"))


def read_run(folder: Path) -> None:
    inspect(InspectConfig(model=str(folder)))
    write_page(folder)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        windows_of("some text\n" * 20, tokenizer, 8, True)


def read_unfinished(folder: Path) -> None:
    state = read_state(folder)
    if state is not None:
        check_key(state, KEY)


def pickled(folder: Path) -> dict[str, Reader]:
    """Pickled weights, and an index of them."""
    tensors = {f"layers.{index}.weight": torch.randn(4, 4) for index in range(3)}
    folder.mkdir()
    torch.save(tensors, folder / PICKLED)
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, PICKLED)}))
    return {
        "pickled index": Reader(folder / PICKLED_INDEX, lambda: pickled_files(folder, "m"), "json"),
        "pickled weights": Reader(folder / PICKLED, lambda: read_pickled(folder / PICKLED)),
    }


def texts(folder: Path) -> dict[str, Reader]:
    """Calibration and evaluation texts, tokens, and tasks."""
    (folder / "a.txt").write_text("Some text, ä €.\n" * 4)
    (folder / "a.jsonl").write_text('{"text": "ä", "more": [1]}\n{"text": "b"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ä", "b"], "more": [1, 2]}), folder / "a.parquet")
    save_tokens(folder / "a.safetensors")
    (folder / "tasks").mkdir()
    question = {"query": "q", "choices": ["a", "b"], "gold": 1}
    (folder / "tasks" / "t.jsonl").write_text(f"{json.dumps(question)}\n" * 3)

    def text(name: str) -> Callable[[], object]:
        return lambda: read_text(str(folder / name))

    return {
        "text": Reader(folder / "a.txt", text("a.txt")),
        "lines of text": Reader(folder / "a.jsonl", text("a.jsonl"), "lines"),
        "parquet": Reader(folder / "a.parquet", text("a.parquet")),
        "tokens": Reader(folder / "a.safetensors", lambda: token_shape(str(folder / "a.safetensors")), "safetensors"),
        "task": Reader(folder / "tasks" / "t.jsonl", lambda: find_tasks((), folder / "tasks", None), "lines"),
    }


def settings_files(folder: Path) -> dict[str, Reader]:
    """YAML of sparsities and blocks."""
    sparsities, blocks = folder / "sparsities.yaml", folder / "blocks.yaml"
    sparsities.write_text("'mlp\\.down_proj$': 0.4\n-1: 2:4\n\"a\": 0\n")
    blocks.write_text(
        "attention: {output: self_attn, linears: [self_attn.q_proj]}\nmlp: {output: a, linears: [b, c]}\n"
    )
    return {
        "sparsities": Reader(sparsities, lambda: PruneConfig(model="m", output=folder / "o", sparsities=sparsities)),
        "blocks": Reader(blocks, lambda: EvaluateConfig(model="m", blocks=blocks)),
    }


def results(folder: Path, pruned: Path) -> dict[str, Reader]:
    """Files that runs, evaluations and comparisons leave."""
    (pruned / EVALUATION_NAME).write_text(EVALUATION.model_dump_json())
    write_state(folder, RunState(key=KEY, seconds={"a": 1}))
    cell = folder / "cell.json"
    cell.write_text(DenseResult(key=KEY, evaluation=EVALUATION).model_dump_json())
    return {
        "record": Reader(pruned / "barber.json", lambda: read_run(pruned), "json", 0.3),
        "evaluation": Reader(pruned / EVALUATION_NAME, lambda: write_page(pruned), "json", 0.3),
        "state": Reader(folder / STATE_NAME, lambda: read_unfinished(folder), "json"),
        "cell": Reader(cell, lambda: read_stored(cell, DenseResult, KEY), "json"),
    }


def gguf_file(path: Path) -> Reader:
    """A GGUF file without a tokenizer, which is refused after most of it was read."""
    make_gguf(path)
    return Reader(path, lambda: CheckpointSource(path), share=0.2)


def packed(folder: Path, dense: Path) -> dict[str, Reader]:
    """A packed checkpoint."""
    rounded = folder.with_name("rounded")
    pack(PackConfig(model=str(dense), output=folder))
    pack(PackConfig(model=str(dense), output=rounded, values="int8"))
    return {
        "packed index": Reader(folder / PACKED_INDEX, lambda: read_packed(folder), "json"),
        "packed shard": Reader(min(folder.glob("packed-*.safetensors")), lambda: read_packed(folder), "safetensors"),
        "rounded shard": Reader(min(rounded.glob("packed-*.safetensors")), lambda: read_packed(rounded), "safetensors"),
    }


NAMES = (
    "configuration", "index", "weights", "tokenizer", "tokenizer's settings", "pickled index", "pickled weights",
    "text", "lines of text", "parquet", "tokens", "task", "sparsities", "blocks", "record", "evaluation", "state",
    "cell", "gguf", "packed index", "packed shard", "rounded shard",
)  # fmt: skip


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("fuzz")
    dense, sharded = make_model(folder / "dense", "llama", **SMALL), make_model(folder / "sharded", "llama", **SMALL)
    add_tokenizer(dense)
    tokens = save_tokens(folder / "tokens.safetensors", 2, 8, 95)
    pruned = folder / "pruned"
    prune(PruneConfig(model=str(dense), output=pruned, calibration=str(tokens), preset="paper", pattern="2:4"))
    split_in_two_shards(sharded)
    (folder / "state").mkdir()
    (folder / "texts").mkdir()
    return {
        "configuration": Reader(dense / "config.json", lambda: read_model(dense), "json"),
        "index": Reader(sharded / INDEX_NAME, lambda: read_model(sharded), "json"),
        "weights": Reader(dense / "model.safetensors", lambda: read_model(dense), "safetensors"),
        "tokenizer": Reader(dense / "tokenizer.json", lambda: read_tokenizer(dense), "json"),
        "tokenizer's settings": Reader(dense / "tokenizer_config.json", lambda: read_tokenizer(dense), "json"),
        "gguf": gguf_file(folder / "a.gguf"),
        **pickled(folder / "pickled"),
        **texts(folder / "texts"),
        **settings_files(folder),
        **packed(folder / "packed", pruned),
        **results(folder / "state", pruned),
    }


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(
    readers: dict[str, Reader], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path))
    reader = readers[name]
    original = reader.file.read_bytes()
    refused: list[BarberError] = []
    if name != "gguf":
        reader.read()

    @settings(
        max_examples=EXAMPLES or max(5, int(40 * reader.share)),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=changed(original, reader.kind))
    def read(content: bytes) -> None:
        reader.file.write_bytes(content)
        try:
            reader.read()
        except BarberError as error:
            refused.append(error)

    try:
        read()
    finally:
        reader.file.write_bytes(original)
    assert all(str(error) and error.hint for error in refused)


def test_all_readers_are_tried(readers: dict[str, Reader]) -> None:
    assert sorted(readers) == sorted(NAMES)
    assert load_file(readers["weights"].file)
