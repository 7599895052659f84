"""A GPU copies finished tensors to host memory while it computes; the writing thread waits for them, nobody else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_barber.checkpoint import host_copies
from llm_barber.checkpoint.host_copies import start_copies


def test_tensors_on_the_cpu_are_taken_as_they_are() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    copies, wait = start_copies({"a": tensor, "b": tensor.t()})
    wait()
    assert copies["a"] is tensor
    assert copies["b"].is_contiguous()
    assert torch.equal(copies["b"], tensor.t())


def test_a_gpu_is_waited_for_by_whoever_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class OnGpu:
        """A tensor on a GPU, of which the copy asks for its shape, dtype and device."""

        shape, dtype, device = (2,), torch.float32, torch.device("cuda:1")

    class Pinned:
        def copy_(self, source: Any, non_blocking: bool) -> Tensor:
            assert non_blocking
            assert isinstance(source, OnGpu)
            events.append("copy")
            return torch.ones(2)

    def record(device: torch.device) -> Any:
        assert device == OnGpu.device
        events.append("record")
        return SimpleNamespace(synchronize=lambda: events.append("wait"))

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Pinned:
        assert (shape, dtype) == (OnGpu.shape, OnGpu.dtype)
        return Pinned()

    monkeypatch.setattr(host_copies, "pinned_memory", pinned)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: record(device))
    )
    copies, wait = start_copies({"a": OnGpu(), "b": OnGpu()})  # type: ignore[dict-item]
    assert list(copies) == ["a", "b"]
    assert events == ["copy", "copy", "record"]  # one event for a device, after all of its copies
    wait()
    assert events[3:] == ["wait"]
