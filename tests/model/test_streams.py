"""Arrays beyond the memory limit are files that vanish by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.model.device import DeviceMemoryError
from llm_barber.model.streams import HIDDEN, ActivationStreams, ArrayMemory
from llm_barber.run import stream as run_module


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


def test_a_gpu_without_memory_is_an_error_with_a_hint(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, "prune_layer", refuse)
    with pytest.raises(DeviceMemoryError, match="the GPU's memory is too small") as caught:
        prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, preset="paper", report=False))
    assert caught.value.hint.startswith("use a smaller --batch-size")
