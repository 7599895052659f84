from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import MambaConfig

from llm_barber.errors import SettingsError
from llm_barber.model.device import (
    current_gpu_kept,
    fixed_order,
    free_device_memory,
    resolve_batch_size,
    resolve_device,
    resolve_dtype,
    stored_score_bytes,
)
from llm_barber.model.empty import empty_model
from tests.conftest import make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("batch_size", "seqlen", "sequences", "device", "expected"),
    [
        (None, 512, 100, CPU, 4),
        (None, 512, 3, CPU, 3),
        (None, 4096, 100, CPU, 1),
        (2, 512, 100, CPU, 2),
        (50, 512, 100, CPU, 4),
        (50, 512, 100, CUDA, 50),
        (None, 2048, 100, CUDA, 4),
    ],
)
def test_batch_size(batch_size: int | None, seqlen: int, sequences: int, device: torch.device, expected: int) -> None:
    assert resolve_batch_size(batch_size, seqlen, sequences, device) == expected


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name, message in (("tpu", "unknown device"), ("meta", "unknown device"), ("cuda:1", "PyTorch sees no GPU")):
        with pytest.raises(SettingsError, match=message):
            resolve_device(name)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_bf16, raising=False)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("float16", CPU) == torch.float16


def test_the_gpu_that_is_meant_is_asked_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["cuda:0"]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.device", entered)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: current[-1] == "cuda:1")
    assert resolve_dtype("auto", torch.device("cuda:1")) is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda:0")) is torch.float32


def test_the_caller_s_gpu_is_current_again(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [2]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current[0])
    monkeypatch.setattr("torch.cuda._maybe_exchange_device", lambda device: current.__setitem__(0, device))
    with pytest.raises(KeyError), current_gpu_kept():
        current[0] = 1
        raise KeyError
    assert current == [2]


def test_a_run_on_the_cpu_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("current_device", "set_device", "_maybe_exchange_device"):
        monkeypatch.setattr(f"torch.cuda.{name}", None)
    with current_gpu_kept():
        pass


@pytest.mark.parametrize(("family", "stores"), [("gemma2", True), ("llama", False)])
def test_families_whose_attention_stores_scores(family: str, stores: bool) -> None:
    config = make_config(family)
    empty_model(config, torch.float32)
    assert stored_score_bytes(config) == (16 * config.num_attention_heads if stores else 0)


def test_a_model_without_attention_stores_no_scores() -> None:
    config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16)
    empty_model(config, torch.float32)
    assert stored_score_bytes(config) == 0


def test_free_memory_is_what_the_process_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 200))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 30)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 20)
    assert [free_device_memory(CUDA, limit) for limit in (None, 150, 60, 10)] == [110, 110, 40, 0]


def mode() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(("device", "within"), [("cpu", (False, False, True)), ("cuda", (True, True, False))])
def test_the_mode_is_as_it_was_afterwards(device: str, within: tuple[bool, bool, bool]) -> None:
    assert mode() == (False, False, True)
    with pytest.raises(KeyError), fixed_order(torch.device(device)):
        assert mode() == within
        raise KeyError
    assert mode() == (False, False, True)
