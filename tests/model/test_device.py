import pytest
import torch

from llm_barber.errors import SettingsError
from llm_barber.model.device import resolve_batch_size, resolve_device, resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "seqlen", "sequences", "device", "expected"),
    [
        (None, 512, 100, CPU, 4),
        (None, 512, 3, CPU, 3),
        (None, 4096, 100, CPU, 1),
        (2, 512, 100, CPU, 2),
        (50, 512, 100, CPU, 4),
        (50, 512, 100, CUDA, 50),
        (None, 2048, 100, CUDA, 8),
    ],
)
def test_batch_size(asked: int | None, seqlen: int, sequences: int, device: torch.device, expected: int) -> None:
    assert resolve_batch_size(asked, seqlen, sequences, device) == expected


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name, message in (("tpu", "unknown device"), ("meta", "unknown device"), ("cuda:1", "PyTorch sees 0")):
        with pytest.raises(SettingsError, match=message):
            resolve_device(name)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has_bf16, raising=False)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("float16", CPU) == torch.float16
