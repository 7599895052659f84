"""Arrays beyond the memory limit are files that vanish by themselves; batches shrink if memory is short."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.loading.job import Job
from llm_barber.method import layer as layer_module
from llm_barber.model.array_memory import ArrayMemory
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.streams import DENSE_OUTPUT, HIDDEN, ActivationStreams
from llm_barber.progress import Silent
from llm_barber.run import stream as run_module
from llm_barber.run.out_of_memory import DeviceMemoryError, with_smaller_batches
from tests.helpers.copies import LateCopier, use_copier
from tests.helpers.runs import read_untimed_files

SETTINGS: dict[str, Any] = {"dtype": "float32", "preset": "mask", "guard": 0, "report": False}


def test_swapped_arrays_are_read_by_each_others_names() -> None:
    streams = ActivationStreams(2, batch_size=2)
    batch = slice(0, 2)
    for name, value in (("one", 1.0), ("other", 2.0)):
        streams.write(name, batch, torch.full((2, 3, 4), value))
    streams.swap("one", "other")
    assert (streams.read("one", batch) == 2).all()
    assert (streams.read("other", batch) == 1).all()
    with pytest.raises(KeyError):
        streams.swap("one", "absent")
    streams.write("other", batch, torch.full((2, 3, 4), 3.0))
    assert (streams.read("one", batch) == 2).all()  # no two names are of one array


def test_arrays_that_are_still_read_are_let_go(tmp_path: Path) -> None:
    """What was written to a file while the next layer was computed must not change; a new array takes its name."""
    memory = ArrayMemory()
    streams = ActivationStreams(2, 2, memory)
    batch, size = slice(0, 2), 2 * 3 * 4 * 4
    for name, value in ((HIDDEN, 1.0), (DENSE_OUTPUT, 2.0), ("other", 3.0)):
        streams.write(name, batch, torch.full((2, 3, 4), value))
    kept = streams.between_layers()
    streams.let_go(list(kept.values()))  # the next layer still starts from it
    assert (streams.read(HIDDEN, batch) == 1).all()
    streams.swap(DENSE_OUTPUT, HIDDEN)
    streams.let_go(list(kept.values()))
    assert memory.used == 3 * size
    streams.write(DENSE_OUTPUT, batch, torch.full((2, 3, 4), 4.0))
    assert (kept[HIDDEN] == 1).all()
    assert [float(streams.read(name, batch)[0, 0, 0]) for name in (HIDDEN, DENSE_OUTPUT, "other")] == [2, 4, 3]
    assert memory.used == 4 * size
    kept.clear()
    assert memory.used == 3 * size


def test_what_does_not_fit_is_a_file_that_is_gone_when_it_is_closed(tmp_path: Path) -> None:
    memory = ArrayMemory(limit=1000, folder=tmp_path)
    streams = ActivationStreams(4, 2, memory)
    values = torch.arange(4 * 3 * 8, dtype=torch.float32).view(4, 3, 8)
    for batch in streams.batches():
        streams.write(HIDDEN, batch, values[batch])
    assert memory.used == 384
    streams.copy(HIDDEN, "other")
    streams.copy(HIDDEN, "third")  # would be 1152 bytes
    assert memory.used == 768
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 1
    assert not list(tmp_path.iterdir())
    streams.write("third", slice(0, 2), values[2:])
    assert torch.equal(streams.read("third", slice(0, 4)), torch.cat([values[2:], values[2:]]))
    streams.drop("third")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert memory.used == 768
    streams.drop("other")
    assert memory.used == 384
    streams.copy(HIDDEN, "fourth")  # there is room again
    assert memory.used == 768
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_pinned_memory_is_counted_as_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    memory = ArrayMemory(limit=4000, folder=tmp_path)
    first = memory.empty_off_device((257,), torch.float32, pinned=True)  # 1028 bytes
    assert memory.used == 2048
    small = memory.empty_off_device((200,), torch.float32, pinned=True)  # 800 bytes
    assert (len(small), memory.used) == (200, 3072)
    del first
    assert memory.used == 3072  # PyTorch keeps the block
    again = memory.empty_off_device((300,), torch.float32, pinned=True)  # and gives it to this one
    assert (len(again), memory.used) == (300, 3072)
    memory.empty_off_device((300,), torch.float32, pinned=True)  # this one is a file
    assert memory.used == 3072


def test_activations_that_cannot_be_pinned_are_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", refuse)
    memory = ArrayMemory(limit=4000)
    with pytest.warns(UserWarning, match="activations cannot be pinned, .* copies: CUDA error: OS call failed"):
        array = memory.empty_off_device((257,), torch.float32, pinned=True)
    assert (array.shape, array.dtype, memory.used) == ((257,), torch.float32, 2048)


def test_room_on_the_device_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = []
    empty = torch.empty

    def made(shape: tuple[int, ...], dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        there.extend([shape[0]] if device is not None else [])
        if device is not None and shape[0] == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", made)
    memory = ArrayMemory(torch.device("meta"), room=1000)
    first = memory.empty((200,), torch.float32)
    second = memory.empty((60,), torch.float32)  # 240 bytes, where 200 are left
    third = memory.empty((50,), torch.float32)
    assert (there, memory.room, memory.used) == ([200, 50], 0, 256)
    del first, second
    assert (memory.room, len(third)) == (800, 50)
    memory.empty((7,), torch.float32)  # which the device has no memory for after all
    del third
    memory.empty((1,), torch.float32)
    assert there == [200, 50, 7]
    assert memory.room is None


def test_tensors_that_stay_on_the_device_take_room() -> None:
    memory = ArrayMemory(room=1000)
    tensors = [torch.zeros(100), torch.zeros(150)]
    assert memory.keep_on_device(tensors)
    assert memory.room == 0
    assert not memory.keep_on_device([torch.zeros(1)])
    del tensors
    assert memory.room == 1000
    assert not memory.keep_on_device([torch.zeros(200), torch.zeros(51)])
    assert memory.room == 1000
    assert not ArrayMemory().keep_on_device([])


def run(model: Path, out: Path, tokens: Path, **settings: Any) -> None:
    prune(PruneConfig(model=model, output=out, calibration=tokens, **SETTINGS, **settings))


def test_less_memory_on_the_device_means_smaller_batches_and_the_same_bytes(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "whole", tokens)
    prune_layer, sizes = run_module.prune_layer, []

    def short(job: Any, index: int, *rest: Any) -> Any:
        """One layer does not fit with four or two sequences, and says so after all its work."""
        sizes.append(rest[-1].batch_size)
        result = prune_layer(job, index, *rest) if rest[-1].batch_size == 1 or index == 0 else None
        if result is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(run_module, "prune_layer", short)
    run(llama, tmp_path / "short", tokens)
    assert sizes == [4, 4, 2, 1]
    assert read_untimed_files(tmp_path / "short") == read_untimed_files(tmp_path / "whole")

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, "prune_layer", never)
    with pytest.raises(DeviceMemoryError, match="one window of 24 tokens, which takes about 0.0 GiB") as caught:
        run(llama, tmp_path / "never", tokens)
    assert "--seqlen" in caught.value.hint


def test_memory_that_runs_out_while_tokens_are_embedded_says_cublas(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "whole", tokens)
    embed, sizes = Skeleton.embed, []

    def short(skeleton: Skeleton, batch: torch.Tensor, write: Any) -> None:
        sizes.append(len(batch))
        if sizes == [4]:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        embed(skeleton, batch, write)

    monkeypatch.setattr(Skeleton, "embed", short)
    run(llama, tmp_path / "short", tokens)
    assert sizes[:3] == [4, 2, 2]
    assert read_untimed_files(tmp_path / "short") == read_untimed_files(tmp_path / "whole")


def test_memory_that_runs_out_at_the_very_end_of_a_layer(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "whole", tokens)
    result, failed = layer_module.block_result, []

    def short(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result(*arguments)

    monkeypatch.setattr(layer_module, "block_result", short)
    run(llama, tmp_path / "short", tokens)
    assert read_untimed_files(tmp_path / "short") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("beside", [False, True], ids=["", "copied beside"])
@pytest.mark.parametrize("allocation", ["owl", "loss"])
def test_memory_that_runs_out_while_sparsities_are_allocated(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, allocation: str, beside: bool
) -> None:
    run(llama, tmp_path / "whole", tokens, allocation=allocation)
    read, sizes = ActivationStreams.read, []

    def short(streams: ActivationStreams, name: str, batch: slice) -> Any:
        """In the second layer, when the first one's results are written, there is room for one sequence only."""
        sizes.append(batch.stop - batch.start)
        if len(sizes) > 2 and sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(streams, name, batch)

    monkeypatch.setattr(ActivationStreams, "read", short)
    if beside:
        use_copier(LateCopier(), monkeypatch)
    run(llama, tmp_path / "short", tokens, allocation=allocation)
    assert sizes[:4] == [4, 4, 4, 2]
    assert set(sizes[4:]) == {1}
    assert read_untimed_files(tmp_path / "short") == read_untimed_files(tmp_path / "whole")


def test_a_layer_that_does_not_fit_leaves_nothing_behind(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_layer, left = Job.open_layer, []

    def short(job: Job, index: int, *arguments: Any) -> Any:
        result = open_layer(job, index, *arguments)
        left.append(
            {name for name, parameter in job.skeleton.layers.named_parameters() if parameter.device.type != "meta"}
        )
        if len(left) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(Job, "open_layer", short)
    run(llama, tmp_path / "out", tokens, allocation="owl")
    assert all(name.startswith("0.") for name in left[2])


@pytest.mark.parametrize(("on_device", "hint"), [(True, "--activations-off-device"), (False, "--batch-size 2")])
def test_several_processes_end_with_what_to_go_on_with(on_device: bool, hint: str) -> None:
    streams = SimpleNamespace(batch_size=4, on_device=on_device, ranks=SimpleNamespace(count=2))

    def short() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    job: Any = SimpleNamespace(skeleton=None)
    with pytest.raises(DeviceMemoryError) as caught:
        with_smaller_batches(short, lambda: None, job, streams, Silent())  # type: ignore[arg-type]
    assert caught.value.hint == f"go on with --resume {hint}"
