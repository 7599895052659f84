"""Full disks, and activations that are written while the next layer is computed."""

import errno
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_barber.checkpoint import activations as activations_module
from llm_barber.checkpoint import durable as durable_module
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.follower import Follower
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.state import Used, read_state
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import BarberError, ModelError, OutputError
from llm_barber.run import stream as run_module
from tests.helpers.resumed_runs import check_resumed
from tests.helpers.runs import read_untimed_files, run, run_stopped


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
    free = model_bytes - written
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


def test_activations_are_written_while_the_next_layer_is_computed(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are kept as they were, however long their writing takes."""
    run(model, tmp_path / "whole", tokens)
    save, prune_layer = writer_module.save_activations, run_module.prune_layer
    begun = [threading.Event() for _ in range(3)]
    kept: dict[int, bytes] = {}

    def slow(folder: Path, layers: int, streams: Any) -> Any:
        assert begun[layers].wait(60)
        time.sleep(0.3)
        saved = save(folder, layers, streams)
        kept[layers] = (folder / saved.file).read_bytes()
        return saved

    def noted(job: Any, index: int, *rest: Any) -> Any:
        begun[index].set()
        return prune_layer(job, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "save_activations", slow)
        patch.setattr(run_module, "prune_layer", noted)
        run(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
    run_stopped(monkeypatch, model, tmp_path / "again", tokens)
    for layers, content in kept.items():
        assert (tmp_path / "again.partial" / f"activations-{layers:05d}.safetensors").read_bytes() == content
    assert kept.keys() == {1, 2}


def test_activations_may_take_longer_to_write_than_the_next_layer_to_compute(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is finished meanwhile; then its own activations wait."""
    run(model, tmp_path / "whole", tokens)
    finished, sync, finish = (
        [threading.Event() for _ in range(4)],
        activations_module.sync_file,
        CheckpointWriter.finish_layer,
    )

    def slow(path: Path) -> str:
        if path.name.startswith("activations-"):
            after = int(path.name[12:17])
            assert finished[after + 1].wait(60)
        return sync(path)

    def noted(self: CheckpointWriter, result: Any, *rest: Any) -> None:
        finish(self, result, *rest)
        finished[len(self.state.layers)].set()

    with monkeypatch.context() as patch:
        patch.setattr(activations_module, "sync_file", slow)
        patch.setattr(CheckpointWriter, "finish_layer", noted)
        run(model, tmp_path / "out", tokens)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_a_full_disk_and_a_lost_source_leave_what_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(model, tmp_path / "whole", tokens)
    save = durable_module.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        if path.name.startswith("activations-00001"):  # while the second layer is computed
            raise OSError(28, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(durable_module, "save_file", full)
    with pytest.raises(OutputError, match="disk of .* is full") as caught:
        run(model, out, tokens)
    assert "--resume" in caught.value.hint
    monkeypatch.undo()
    check_resumed(monkeypatch, tmp_path, model, tokens, [2], [0, 1])  # the second layer is finished, too
    monkeypatch.undo()

    from llm_barber.checkpoint.source import CheckpointSource

    read, reads = CheckpointSource.read, 0

    def lost(self: CheckpointSource, names: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            (model / "model.safetensors").rename(tmp_path / "elsewhere")
        return read(self, names)

    monkeypatch.setattr(CheckpointSource, "read", lost)
    with pytest.raises(BarberError) as gone:
        run(model, tmp_path / "again", tokens)
    assert isinstance(gone.value, ModelError)
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(model / "model.safetensors")
    run(model, tmp_path / "again", tokens, resume=True)
    assert read_untimed_files(tmp_path / "again") == read_untimed_files(out)
