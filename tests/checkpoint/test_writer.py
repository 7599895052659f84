import errno
import fcntl
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llm_barber.checkpoint import activation_writer
from llm_barber.checkpoint import durable as durable_module
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.behind import WriteBehind
from llm_barber.checkpoint.companions import LOCK_NAME, REPLACED
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.state import RunState, Used, write_state
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


def test_shards_index_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    names = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {path.name for path in out.iterdir()} == {*names, "model.safetensors.index.json", "config.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 16
    assert set(index["weight_map"].values()) == names
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("fail", [RuntimeError("x"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path: Path, fail: BaseException) -> None:
    with pytest.raises(type(fail)):
        write(tmp_path / "out", fail=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, value=1.0)
    with pytest.raises(OutputError, match="exists") as caught:
        write(out, value=2.0)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(RuntimeError):
        write(out, overwrite=True, value=2.0, fail=RuntimeError())
    assert load_file(out / "model-00001-of-00002.safetensors")["a"][0] == 1.0
    write(out, overwrite=True, value=2.0)
    assert load_file(out / "model-00001-of-00002.safetensors")["a"][0] == 2.0
    assert list(tmp_path.iterdir()) == [out]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="something other than a model"):
        write(out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_the_work_folder_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / LOCK_NAME).write_text("")
    (folder / "model-00001-of-00009.safetensors.tmp").write_text("half")
    write(tmp_path / "out")
    assert not folder.exists()
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shards=1, overwrite=False, needed=0) as first:
        first.write_shard({"a": torch.ones(1)})
        with pytest.raises(OutputError, match="another run is writing"):
            write(tmp_path / "out")
        first.wait_for_shards()
        assert (first.folder / "model-00001-of-00001.safetensors").exists()
        first.finish()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match="cannot be locked: Function not implemented"):
        write(tmp_path / "out")


def test_disk_too_small(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"takes 1 EB, the disk of .* has") as caught,
        CheckpointWriter(tmp_path / "out", shards=1, overwrite=False, needed=10**18),
    ):
        pass
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_that_has_the_work_folders_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "link.partial").symlink_to(tmp_path / "other")
    for name in ("out", "link"):
        with pytest.raises(OutputError, match="is in the way"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "out.partial" / "model.safetensors").read_text() == "precious"


def test_parents_that_were_made_are_removed_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write(tmp_path / "deep" / "er" / "out", fail=RuntimeError())
    assert list(tmp_path.iterdir()) == []


def test_the_replaced_folder_comes_back_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, value=1.0)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot write"):
        write(out, overwrite=True, value=2.0)
    assert load_file(out / "model-00001-of-00002.safetensors")["a"][0] == 1.0
    assert list(tmp_path.iterdir()) == [out]


def test_mount_points_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(OutputError, match="mount point"):
        check_output(tmp_path / "out", overwrite=False)


def test_an_output_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="exists"),
        CheckpointWriter(out, shards=1, overwrite=False, needed=0) as writer,
    ):
        writer.write_shard({"a": torch.ones(1)})
        writer.finish_layer({}, {}, Used())
        out.mkdir()
        (out / "precious.txt").write_text("x")
        writer.finish()
    assert (out / "precious.txt").read_text() == "x"
    shutil.rmtree(out)
    with CheckpointWriter(out, shards=1, overwrite=False, needed=0, resume=True) as writer:  # nothing was lost
        assert writer.next_is_written
        writer.skip_shard()
        writer.finish()
    assert load_file(out / "model-00001-of-00001.safetensors").keys() == {"a"}


def test_a_shard_that_disappears_meanwhile_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="model-00001-of-00001.safetensors is not in .*out.partial any more"),
        CheckpointWriter(tmp_path / "out", shards=1, overwrite=False, needed=0) as writer,
    ):
        writer.write_shard({"a": torch.ones(1)})
        writer.finish_layer({}, {}, Used())
        writer.wait_for_shards()
        (writer.folder / "model-00001-of-00001.safetensors").unlink()
        writer.finish()
    assert not (tmp_path / "out").exists()


def test_an_empty_work_folder_is_used(tmp_path: Path) -> None:
    """A kill leaves an empty folder before the lock file is made, or after it is removed."""
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_is_held_until_activations_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second interruption ends the waiting, and not the writing: no other run may write in the folder meanwhile."""
    goes_on, save = threading.Event(), activation_writer.save_activations

    def slow(*arguments: Any) -> Any:
        assert goes_on.wait(60)
        return save(*arguments)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(activation_writer, "save_activations", slow)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 2, False, 0) as writer:
        writer.write_shard({"a": torch.ones(1)})
        writer.finish_layer({}, {}, Used())
        writer.keep_activations(1, {"hidden": torch.ones(1)})
        monkeypatch.setattr(WriteBehind, "wait", interrupted)  # the second interruption, while the writer waits
        raise KeyboardInterrupt
    monkeypatch.undo()
    with pytest.raises(OutputError, match="another run is writing"):
        write(tmp_path / "out")
    goes_on.set()
    deadline = time.monotonic() + 60
    while writer._work_folder.lock.is_locked and time.monotonic() < deadline:
        time.sleep(0.01)
    with CheckpointWriter(tmp_path / "out", 2, False, 0, resume=True) as again:
        reached, activations = again.read_activations()
        assert reached == 1
        assert activations.keys() == {"hidden"}


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


def test_only_folders_that_runs_replaced_are_removed(tmp_path: Path) -> None:
    for name in ("out.replaced-123", "out.replaced-124", "out.replaced-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "out.replaced-123" / REPLACED).touch()
    (tmp_path / "out.replaced-7").write_text("a file")
    write(tmp_path / "out")
    expected = {"out", "out.replaced-124", "out.replaced-mine", "out.replaced-7"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_folders_in_the_work_folder_are_no_obstacle(tmp_path: Path) -> None:
    for settings in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", 2, False, 0, resume=True) as writer:
            writer.write_shard({"a": torch.ones(1)})
            writer.finish_layer({}, {}, Used())
            writer.keep_activations(1, {"hidden": torch.ones(1)})
            (writer.folder / "additional_chat_templates").mkdir()
            (writer.folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
            raise KeyboardInterrupt
        with CheckpointWriter(tmp_path / "out", 2, **{"overwrite": False, **settings}, needed=0) as writer:
            assert writer.next_is_written is (settings == {"resume": True})
            assert not (writer.folder / "additional_chat_templates").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


@pytest.mark.parametrize("own", [None, ValueError("of the run")])
def test_a_copy_that_fails_does_not_hide_the_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Exception | None
) -> None:
    """A GPU's error arrives in the writing thread; nothing is written of what was not copied."""

    def fail() -> None:
        raise RuntimeError("a copy failed")

    monkeypatch.setattr(writer_module, "start_copies", lambda tensors: (dict(tensors), fail))
    expected = own or RuntimeError("a copy failed")
    with pytest.raises(type(expected), match=str(expected)), CheckpointWriter(tmp_path / "out", 1, False, 1) as writer:
        writer.write_shard({"a": torch.ones(2)})
        if own is not None:
            raise own
    assert not list(tmp_path.rglob("*.safetensors"))


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
        assert load_file(out / "model-00001-of-00002.safetensors")["a"][0] == value
        assert len(list(tmp_path.glob("out.replaced-*"))) == left
        assert "is not needed any more and cannot be removed" in caplog.text
    write(out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


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
