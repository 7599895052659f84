"""A checkpoint that is written: only the whole one gets its name, and nothing else is harmed."""

import errno
import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llm_barber.checkpoint import durable as durable_module
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.companions import LOCK_NAME, REPLACED
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.state import RunState, write_state
from llm_barber.checkpoint.unfinished import unfinished_run
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import OutputError


def write(output: Path, overwrite: bool = False, value: float = 1.0, fail: BaseException | None = None) -> None:
    with CheckpointWriter(output, shards=2, overwrite=overwrite, needed=100) as writer:
        writer.write_shard({"a": torch.full((3,), value)})
        if fail is not None:
            raise fail
        writer.write_shard({"b": torch.ones(2, dtype=torch.bfloat16)})
        writer.write_file("config.json", b"{}")
        writer.finish()


def value_of(output: Path) -> float:
    """The value that `write` wrote."""
    return float(load_file(output / "model-00001-of-00002.safetensors")["a"][0])


def finish_layer(writer: CheckpointWriter) -> None:
    """Write a layer of one tensor."""
    writer.finish_layer(0, {"a": torch.ones(1)}, {}, {"layers": ({},)})


def test_shards_index_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out)
    names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {path.name for path in out.iterdir()} == {*names, "model.safetensors.index.json", "config.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 16
    assert set(index["weight_map"].values()) == names
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("fail", [RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", ["out", "deep/er/out"])
def test_failure_leaves_nothing(tmp_path: Path, output: str, fail: BaseException) -> None:
    with pytest.raises(type(fail)):
        write(tmp_path / output, fail=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, value=1.0)
    with pytest.raises(OutputError, match="exists") as caught:
        write(out, value=2.0)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(RuntimeError):
        write(out, overwrite=True, value=2.0, fail=RuntimeError())
    assert value_of(out) == 1.0
    write(out, overwrite=True, value=2.0)
    assert value_of(out) == 2.0
    assert list(tmp_path.iterdir()) == [out]


def test_the_replaced_folder_comes_back_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    write(out, value=1.0)

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot write"):
        write(out, overwrite=True, value=2.0)
    assert value_of(out) == 1.0
    assert list(tmp_path.iterdir()) == [out]


def test_a_replaced_folder_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The output is complete; what is left has a name of its own, also where the process's number comes again."""
    out = tmp_path / "out"
    write(out, value=1.0)

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "busy")

    for value, left in ((2.0, 1), (3.0, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", busy)
            write(out, overwrite=True, value=value)
        assert value_of(out) == value
        assert len(list(tmp_path.glob("out.replaced-*"))) == left
        assert "is not needed any more and cannot be removed" in caplog.text
    write(out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


def test_only_folders_that_runs_replaced_are_removed(tmp_path: Path) -> None:
    for name in ("out.replaced-123", "out.replaced-124", "out.replaced-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "out.replaced-123" / REPLACED).touch()
    (tmp_path / "out.replaced-7").write_text("a file")
    write(tmp_path / "out")
    expected = {"out", "out.replaced-124", "out.replaced-mine", "out.replaced-7"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_other_files_and_folders_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out", "in-the-way.partial", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    (tmp_path / "link.partial").symlink_to(tmp_path / "other")
    (tmp_path / "file").write_text("")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    for name, message in (
        ("out", "something other than a model"),
        ("in-the-way", "is in the way"),
        ("link", "is in the way"),
        ("file", "is a file"),
        ("file/out", "cannot write"),
        ("mounted", "mount point"),
    ):
        with pytest.raises(OutputError, match=message):
            write(tmp_path / name, overwrite=True)
    assert len(list(tmp_path.glob("*/thesis.tex"))) == 4


@pytest.mark.parametrize("left", [{}, {LOCK_NAME: "", "model-00001-of-00009.safetensors.tmp": "half"}])
def test_the_work_folder_of_a_killed_run_is_replaced(tmp_path: Path, left: dict[str, str]) -> None:
    """A kill leaves an empty folder before the lock file is made, or after it is removed."""
    (tmp_path / "out.partial").mkdir()
    for name, content in left.items():
        (tmp_path / "out.partial" / name).write_text(content)
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_folders_in_the_work_folder_are_no_obstacle(tmp_path: Path) -> None:
    for settings in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 2, False, 0, resume=True) as writer:
            finish_layer(writer)
            (writer.folder / "additional_chat_templates").mkdir()
            (writer.folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
            raise KeyboardInterrupt
        with CheckpointWriter(tmp_path / "out", 2, **{"overwrite": False, **settings}, needed=0) as writer:
            assert writer.next_is_written is (settings == {"resume": True})
            assert not (writer.folder / "additional_chat_templates").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shards=1, overwrite=False, needed=0) as first:
        first.write_shard({"a": torch.ones(1)})
        with pytest.raises(OutputError, match="another run is writing"):
            write(tmp_path / "out")
        first.finish()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match="cannot be locked: Function not implemented"):
        write(tmp_path / "out")


def test_the_lock_is_held_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second interruption ends the waiting, and not the writing: no other run may write in the folder meanwhile."""
    began, goes_on, sync = threading.Event(), threading.Event(), writer_module.sync_file

    def slow(path: Path) -> str:
        began.set()
        assert goes_on.wait(60)
        return sync(path)

    def interrupted(_: CheckpointWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "sync_file", slow)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 2, False, 0) as writer:
        finish_layer(writer)
        monkeypatch.setattr(CheckpointWriter, "wait_for_shards", interrupted)
        raise KeyboardInterrupt
    assert began.wait(60)  # the thread has the slow function
    monkeypatch.undo()
    with pytest.raises(OutputError, match="another run is writing"):
        write(tmp_path / "out")
    released = threading.Event()
    assert writer._writing is not None
    writer._writing.add_done_callback(lambda _: released.set())  # after the callback that releases the lock
    goes_on.set()
    assert released.wait(60)
    with CheckpointWriter(tmp_path / "out", 2, False, 0, resume=True) as again:
        assert len(again.state.layers) == 1


def test_the_lock_is_held_until_the_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, refused = shutil.rmtree, []

    def remove_and_check(folder: Path) -> None:
        with pytest.raises(OutputError, match="another run is writing"):
            write(tmp_path / "out")
        refused.append(folder)
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", remove_and_check)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 1, False, 0):
        raise KeyboardInterrupt
    assert refused == [tmp_path / "out.partial"]
    assert not list(tmp_path.iterdir())


def test_the_lock_is_taken_again_after_its_folder_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has removed its work folder after this one opened the lock in it."""
    flock, opened = fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if how == fcntl.LOCK_EX | fcntl.LOCK_NB:
            if not opened:
                shutil.rmtree(tmp_path / "out.partial")
            opened.append(lock)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "out")
    assert len(opened) == 2


def test_an_output_finished_by_another_run_before_the_lock_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(lock: Any, how: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "out.partial")
        write(tmp_path / "out")
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists"), CheckpointWriter(out, 1, False, 0) as writer:
        finish_layer(writer)
        out.mkdir()
        (out / "precious.txt").write_text("x")
        writer.finish()
    assert (out / "precious.txt").read_text() == "x"
    shutil.rmtree(out)
    with CheckpointWriter(out, 1, False, 0, resume=True) as writer:  # nothing was lost
        assert writer.next_is_written
        writer.finish()
    assert load_file(out / "model-00001-of-00001.safetensors").keys() == {"a"}


def test_a_shard_that_disappears_meanwhile_is_reported(tmp_path: Path) -> None:
    missing = "model-00001-of-00001.safetensors is not in .*out.partial any more"
    with pytest.raises(OutputError, match=missing), CheckpointWriter(tmp_path / "out", 1, False, 0) as writer:
        finish_layer(writer)
        writer.wait_for_shards()
        (writer.folder / "model-00001-of-00001.safetensors").unlink()
        writer.finish()
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"takes 1 EB, the disk of .* has") as caught:
        check_output(tmp_path / "out", overwrite=False, needed=10**18)
    assert "free some space" in caught.value.hint


@pytest.mark.parametrize("wrapped", [False, True])
def test_disk_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    def full(_tensors: object, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half")
        if wrapped:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable_module, "save_file", full)
    with pytest.raises(OutputError, match="disk of .* is full"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", [None, ValueError("of the run")])
def test_a_failed_write_does_not_hide_the_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Exception | None
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the write failed")

    monkeypatch.setattr(writer_module, "save_tensors", fail)
    expected = own or RuntimeError("the write failed")
    with pytest.raises(type(expected), match=str(expected)), CheckpointWriter(tmp_path / "out", 1, False, 1) as writer:
        writer.write_shard({"a": torch.ones(2)})
        if own is not None:
            raise own
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("begun", [{"sparsities": {"a": 0.5}}, {"channel_order": "digest"}])
@pytest.mark.parametrize("key", [{}, {"seed": 0}])
def test_what_took_long_before_the_first_layer_is_not_deleted(
    tmp_path: Path, begun: dict[str, Any], key: dict[str, Any]
) -> None:
    write_state(tmp_path, RunState(key=key, **begun))
    with pytest.raises(OutputError, match="unfinished run with no finished layer yet") as caught:
        unfinished_run(tmp_path, key, overwrite=False, resume=False)
    assert ("--resume" in caught.value.hint) == bool(key)  # a command without a key cannot resume
    assert unfinished_run(tmp_path, key, overwrite=True, resume=False) is None
