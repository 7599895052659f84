"""Products run on PyTorch's threads, also where a process has another OpenMP library."""

import logging
import os
from pathlib import Path

import pytest
import torch

from llm_barber.checkpoint.encoding import pack
from llm_barber.native import library, threads
from llm_barber.runtime.packed_linear import PackedLinear

THREADS = 3


@pytest.mark.skipif(library() is None or not Path("/proc/self/task").exists(), reason="needs the C extension and /proc")
def test_a_product_begins_no_threads_beside_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.utils._openmp_helpers")  # brings an OpenMP library of its own
    threads.openmp_functions.cache_clear()
    assert threads.openmp_functions() is not None
    monkeypatch.setattr("llm_barber.native.threads.VALUES_A_THREAD", 1)
    weight = torch.ones(64, 64)
    weight[:, ::2] = 0
    packed = pack(weight)
    assert packed is not None
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        torch.ones(1 << 20).add_(1)  # PyTorch begins its threads
        running = set(os.listdir("/proc/self/task"))
        assert PackedLinear(packed, None)(torch.ones(1, 64)).eq(32).all()
        assert not set(os.listdir("/proc/self/task")) - running
    finally:
        torch.set_num_threads(before)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    threads.openmp_functions.cache_clear()
    with caplog.at_level(logging.INFO, logger="llm_barber"):
        assert threads.openmp_functions() is None
    threads.openmp_functions.cache_clear()
    assert "packed products run on one thread" in caplog.text
