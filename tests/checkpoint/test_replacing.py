"""Folders that an output may replace."""

import json
import os
from pathlib import Path

import pytest

from llm_barber import PackConfig, PruneConfig, pack, prune
from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.replacing import check_replaceable
from llm_barber.errors import OutputError, SettingsError
from llm_barber.usage import readable_bytes
from tests.conftest import make_model


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", ["", ".", "..", "/", "~", "~/.."])
def test_an_output_is_never_a_folder_in_use(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """The folders hold a config.json, which makes them look replaceable."""
    home = make_model(tmp_path / "homes" / "home", "llama")
    (home.parent / "config.json").write_text("{}")
    current = make_model(tmp_path / "outer" / "current", "llama")
    (current.parent / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(current)
    before = files(tmp_path)
    with pytest.raises(SettingsError, match="the current folder|the home folder|not a folder's name"):
        prune(PruneConfig(model=llama, output=Path(output), calibration=tokens, overwrite=True))
    with pytest.raises(SettingsError, match="the current folder|the home folder|not a folder's name"):
        pack(PackConfig(model=llama, output=Path(output), overwrite=True))
    with pytest.raises(OutputError, match="is the current folder|is a folder above|is the home folder"):
        check_output(Path(output).expanduser().resolve(), overwrite=True)
    assert files(tmp_path) == before


def test_other_folders_are_not_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_in_use(tmp_path / "out") is None
    removed = tmp_path / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    assert folder_in_use(tmp_path / "out") is None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "llama")


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    "other",
    ["thesis.tex", "data.json", "notes.txt", "results/table.csv", ".git/HEAD", "additional_chat_templates/a.py"],
)
def test_a_folder_with_other_files_is_not_replaced(model: Path, record: bool, other: str) -> None:
    if record:
        content = {"files": dict.fromkeys(["config.json", "model.safetensors", "generation_config.json"], "")}
        (model / "barber.json").write_text(json.dumps(content))
    check_replaceable(model)
    (model / other).parent.mkdir(exist_ok=True)
    (model / other).write_text("years of work")
    named = other if other.startswith("additional") else other.partition("/")[0]
    with pytest.raises(OutputError, match=f"holds files that .*: {named}") as caught:
        check_output(model, overwrite=True)
    assert "--overwrite would delete them" in caught.value.hint


def test_files_of_a_record_are_replaced_whatever_their_names(model: Path) -> None:
    (model / "merges.v2.txt").write_text("")
    with pytest.raises(OutputError, match=r"merges\.v2\.txt"):
        check_replaceable(model)
    names = [path.name for path in model.iterdir()]
    (model / "barber.json").write_text(json.dumps({"files": dict.fromkeys(names, "")}))
    (model / "report.html").write_text("")
    (model / "evaluation.json.tmp").write_text("")  # a run was killed while it wrote the file
    check_replaceable(model)
    (model / "barber.json").write_text("{")  # damaged: it vouches for no name
    with pytest.raises(OutputError, match=r"merges\.v2\.txt"):
        check_replaceable(model)


def test_checkpoints_of_hugging_face_are_replaced(model: Path) -> None:
    for name in (
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "merges.txt", "vocab.json", "tokenizer.model",
        "qwen.tiktoken", "chat_template.jinja",
        "preprocessor_config.json", "README.md", "LICENSE", "USE_POLICY.md", "pytorch_model.bin", ".gitattributes",
        "packed-model-00001-of-00004.safetensors", "packed-model.safetensors", "packed.index.json",
    ):  # fmt: skip
        (model / name).write_text("")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("")
    check_replaceable(model)


def test_many_files_are_counted(model: Path) -> None:
    for number in range(9):
        (model / f"photo-{number}.jpg").write_text("")
    with pytest.raises(OutputError, match=r"(?m)photo-0.jpg, .*photo-4.jpg and 4 more$"):
        check_replaceable(model)


def test_an_output_inside_its_model_is_refused(model: Path, tokens: Path) -> None:
    for output in (model, model / "pruned", model.parent):
        with pytest.raises(SettingsError, match=r"output .*(MODEL|PRUNED)"):
            PruneConfig(model=model, output=output, calibration=tokens)
        with pytest.raises(SettingsError, match=r"output .*(MODEL|PRUNED)"):
            PackConfig(model=model, output=output)
    os.symlink(model, model.parent / "link")
    with pytest.raises(SettingsError, match="lies inside MODEL"):
        PruneConfig(model=model, output=model.parent / "link" / "pruned", calibration=tokens)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (123_456, "123 kB"), (999_600, "1 MB"),
        (-2_500_000, "-2.5 MB"), (140_000_000_000, "140 GB"), (10**18, "1 EB"), (12_300 * 10**18, "12300 EB"),
    ],
)  # fmt: skip
def test_sizes_are_never_shown_as_nothing(size: int, words: str) -> None:
    assert readable_bytes(size) == words


@pytest.mark.parametrize(
    ("size", "words"), [(1023, "1023 bytes"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (3 * 2**30, "3 GiB")]
)
def test_sizes_in_binary_units(size: int, words: str) -> None:
    assert readable_bytes(size, 1024) == words


def test_a_folder_is_the_same_by_any_of_its_paths(model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is mounted in two places has two paths that no link joins."""
    other = model.parent / "mounted"
    other.mkdir()
    is_same = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda path, folder: is_same(model if path == other else path, folder))
    for output in (other, other / "pruned"):
        with pytest.raises(SettingsError, match="is MODEL|lies inside MODEL"):
            PruneConfig(model=model, output=output, calibration=tokens)
    PruneConfig(model=model, output=model.parent / "out", calibration=tokens)


def test_the_folder_of_linked_shards_is_no_output(model: Path, tokens: Path) -> None:
    shards = model.parent / "shards"
    shards.mkdir()
    (shard,) = model.glob("*.safetensors")
    shard.rename(shards / shard.name)
    shard.symlink_to(shards / shard.name)
    with pytest.raises(SettingsError, match="contains MODEL"):
        PruneConfig(model=model, output=shards, calibration=tokens)
