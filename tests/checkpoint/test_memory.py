"""Memory for tensors that a GPU copies."""

from typing import Any

import pytest
import torch

from llm_barber.checkpoint.memory import pinned_memory


def test_memory_that_cannot_be_pinned_is_ordinary_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(shape: tuple[int, ...], pin_memory: bool = False, **settings: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")
        return empty(shape, **settings)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match="cannot be pinned, so the GPU waits for copies: CUDA error: OS call failed"):
        memory = pinned_memory((2, 3), torch.bfloat16)
    assert (memory.shape, memory.dtype, memory.device.type) == ((2, 3), torch.bfloat16, "cpu")
