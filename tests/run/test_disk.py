"""Full disks: what is kept, what needs no room again, and what is said."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import PruneConfig
from llm_barber.checkpoint import activation_writer
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.state import Used, read_state
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import BarberError, ModelError, OutputError
from llm_barber.run.dry_run import dry_run
from tests.conftest import COMMON
from tests.helpers.resumed_runs import check_resumed
from tests.helpers.runs import SETTINGS, keep_each_input, read_untimed_files, run, run_stopped


def room_for_activations(model: Path, tokens: Path, work_folder: Path, **settings: Any) -> int:
    """Bytes of the files of activations of a run of `model` on `tokens` that `work_folder` has not yet."""
    config = PruneConfig(model=model, output=work_folder / "none", calibration=tokens, **{**SETTINGS, **settings})
    kept = sum(path.stat().st_size for path in work_folder.glob("activations-*.safetensors"))
    return max(0, dry_run(config).activation_file_bytes - kept)


def test_a_disk_has_room_for_files_of_activations(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both arrays that a layer starts from with `mask`, three times."""
    sequences, seqlen = load_file(tokens)["input_ids"].shape
    needed = CheckpointSource(model).bytes + 3 * 2 * sequences * seqlen * COMMON["hidden_size"] * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    for start in (run, lambda *_: room_for_activations(model, tokens, tmp_path)):
        with pytest.raises(OutputError, match=r"takes .*, files of activations meanwhile .*, the disk of"):
            start(model, tmp_path / "out", tokens)
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    run(model, tmp_path / "out", tokens)


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_what_is_written_already_needs_no_room_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """A packed shard stands for its unpacked bytes: the rest is counted unpacked."""
    run(model, tmp_path / "whole", tokens, format=format)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, format=format)
    written = sum(path.stat().st_size for path in (tmp_path / "out.partial").glob("*model*.safetensors"))
    if format == "packed":
        packed, written = written, sum(shard.bytes for shard in read_state(tmp_path / "out.partial").shards.values())
        assert packed < written
    model_bytes = CheckpointSource(model).bytes
    assert 0 < written < model_bytes
    free = model_bytes - written + room_for_activations(model, tokens, tmp_path / "out.partial", format=format)
    files = sum(path.stat().st_size for path in (tmp_path / "out.partial").iterdir() if "activations" not in path.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - files))  # headers, states, lock
    with pytest.raises(OutputError, match="the disk of"):
        run(model, tmp_path / "out", tokens, resume=True, format=format)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], format=format)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(OutputError, match="the disk of"):
        run(model, tmp_path / "other", tokens)


def test_what_could_not_be_kept_is_not_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm_barber.checkpoint.writer.write_state", full)
    with pytest.raises(OutputError, match="is full"), CheckpointWriter(tmp_path / "out", 2, False, 0) as writer:
        writer.write_shard({"a": torch.ones(1)})
        writer.finish_layer({}, {}, Used())
    assert not writer.resumable
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_by_whoever_writes_no_model(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="the disk of /any is full; activations") as caught,
        Follower(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/any")
    assert "--resume" in caught.value.hint


def test_a_full_disk_and_a_lost_source_leave_what_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(model, tmp_path / "whole", tokens)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    keep_each_input(monkeypatch)
    monkeypatch.setattr(activation_writer, "save_activations", full)  # while the second layer is computed
    with pytest.raises(OutputError, match="disk of .* is full") as caught:
        run(model, out, tokens)
    assert "--resume" in caught.value.hint
    monkeypatch.undo()
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [0, 1])  # the second layer is finished, too
    monkeypatch.undo()

    from llm_barber.checkpoint.source import CheckpointSource

    read, reads = CheckpointSource.read, 0

    def lost(self: CheckpointSource, *arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            (model / "model.safetensors").rename(tmp_path / "elsewhere")
        return read(self, *arguments)

    monkeypatch.setattr(CheckpointSource, "read", lost)
    with pytest.raises(BarberError) as gone:
        run(model, tmp_path / "again", tokens)
    assert isinstance(gone.value, ModelError)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(model / "model.safetensors")
    run(model, tmp_path / "again", tokens, resume=True)
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(out)


def test_leftovers_that_a_resumed_run_deletes_are_room(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens)
    partial = tmp_path / "out.partial"
    written = sum(shard.bytes for shard in read_state(partial).shards.values())
    (partial / "model-00003-of-00009.safetensors").write_bytes(bytes(9000))  # of a shard that no state names
    free = CheckpointSource(model).bytes - written - 9000 + room_for_activations(model, tokens, partial)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_resumed(monkeypatch, tmp_path, model, tokens, [2])
