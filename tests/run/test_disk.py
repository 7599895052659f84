"""Full disks: what is kept, what needs no room again, and what is said."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import ModelError, OutputError
from tests.helpers.ranks import REFUSED, run_ranks
from tests.helpers.runs import MASK_ALONE, read_untimed_files, resume, run, run_stopped


@pytest.mark.parametrize("settings", [{}, {"format": "packed"}, MASK_ALONE], ids=["dense", "packed", "SparseGPT"])
def test_what_is_written_already_needs_no_room_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Packed shards are counted unpacked. Updated weights, which are in float32, are kept beside the output."""
    source = CheckpointSource(model)
    linears = sum(info.bytes for name, info in source.tensors.items() if "_proj" in name)
    needed = source.bytes + (linears if settings is MASK_ALONE else 0)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **settings)
    written = sum(path.stat().st_size for path in (tmp_path / "out.partial").iterdir())
    for out, free in (("out", needed - written), ("other", needed)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free - 1))
        with pytest.raises(OutputError, match="the disk of") as caught:
            run(model, tmp_path / out, tokens, resume=True, **settings)
        assert "free some space" in caught.value.hint
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        run(model, tmp_path / out, tokens, resume=True, **settings)


def full(*_: Any, **__: Any) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device", "/any")


def test_what_could_not_be_kept_is_not_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_barber.checkpoint.writer.write_state", full)
    with pytest.raises(OutputError, match="is full"), CheckpointWriter(tmp_path / "out", 2, False, 0) as writer:
        writer.finish_layer(0, {"a": torch.ones(1)}, {}, {"layers": ({},)})
    assert not writer.resumable
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_by_whoever_writes_no_model(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that do not fit into the memory are files of every process."""
    monkeypatch.setattr("llm_barber.model.streams.ActivationStreams.write", full)
    assert run_ranks(2, lambda _: run(model, tmp_path / "out", tokens), tmp_path) == [REFUSED, REFUSED]
    assert "out is full" in (tmp_path / "1").read_text()


def test_a_lost_source_leaves_what_is_finished(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens, initial="wanda")
    read, reads = CheckpointSource.read, 0

    def lost(self: CheckpointSource, *arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 4:
            (model / "model.safetensors").rename(tmp_path / "elsewhere")
        return read(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr(CheckpointSource, "read", lost)
        run(model, tmp_path / "out", tokens, initial="wanda")
    (tmp_path / "elsewhere").rename(model / "model.safetensors")
    assert resume(model, tmp_path / "out", tokens, initial="wanda")[0] == ["-0", "-1", "2"]
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")
