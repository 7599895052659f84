"""The speed of packed products is measured with weights from memory, called from Python and in a CUDA graph."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.tools.selftest import speeds
from llm_barber.tools.selftest.bench import Bench


@pytest.mark.parametrize("captures", [False, True])
def test_each_weight_is_multiplied_in_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    multiplied: list[int] = []
    captured: list[int] = []
    forward = PackedLinear.forward

    def noted(linear: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        multiplied.append(linear.values.data_ptr())
        return forward(linear, inputs)

    class Graph:
        def replay(self) -> None:
            captured.append(len(multiplied))

    @contextmanager
    def capture(_: Any) -> Iterator[None]:
        before = len(multiplied)
        yield
        captured.append(len(multiplied) - before)

    monkeypatch.setattr(speeds, "SHAPE", (64, 256))
    monkeypatch.setattr(speeds, "ROTATED_BYTES", 100_000)
    monkeypatch.setattr(speeds, "has_kernels", lambda _: captures)
    monkeypatch.setattr(PackedLinear, "forward", noted)
    for name, value in (
        ("synchronize", lambda _: None), ("CUDAGraph", Graph), ("graph", capture), ("device", nullcontext),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    text = speeds.packed_speed(bench)
    weights = len(set(multiplied))
    assert weights * 64 * 256 * 4 * 0.6 > 100_000  # float32 of which half is kept, with places: over half of the bytes
    rounds = 6  # one to warm up
    assert multiplied[:weights] * (rounds + captures) == multiplied
    speed = r"\d+\.\d µs"
    if captures:
        assert captured[0] == weights
        assert re.search(rf"packed {speed} \(\d+\.\d in a CUDA graph\), dense {speed} \(\d+\.\d in", text), text
    else:
        assert not captured
        assert re.search(rf"packed {speed}, dense {speed} \(Triton's kernels do not run", text), text
