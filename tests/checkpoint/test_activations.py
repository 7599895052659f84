"""Files of activations: the format, the digest, and pieces that become durable one by one."""

import hashlib
import os
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128

from llm_barber.checkpoint import activations as activations_module
from llm_barber.checkpoint.activations import (
    Activations,
    StoppedError,
    load_activations,
    newest_activations,
    save_activations,
)


def streams(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 7, generator=generator)
    return {"hidden": hidden.bfloat16(), "dense hidden": hidden, "half": hidden.half()}


def is_same(tensors: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    assert tensors is not None
    return tensors.keys() == expected.keys() and all(
        tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("piece", [1, 13, 64, 420, 2**26])
def test_a_file_is_a_safetensors_file_whatever_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(activations_module, "PIECE", piece)
    saved = save_activations(tmp_path, 7, streams(), Event())
    path = tmp_path / "activations-00007.safetensors"
    assert [path] == list(tmp_path.iterdir())
    assert is_same(load_file(path), streams())
    assert is_same(load_activations(tmp_path, saved), streams())
    assert saved == Activations(layers=7, file=path.name, xxh3_128=xxh3_128(path.read_bytes()).hexdigest())


def test_no_more_than_a_piece_is_ever_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fsync, whole = os.fsync, 105 * (2 + 4 + 2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sizes.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    monkeypatch.setattr(activations_module, "PIECE", 400)
    save_activations(tmp_path, 1, streams(), Event())
    *files, _ = sizes  # the last is the folder's
    assert files[-1] == (tmp_path / "activations-00001.safetensors").stat().st_size > whole
    assert all(after - before <= 400 for before, after in zip([0, *files], files, strict=False))


def test_writing_ends_between_two_pieces_when_it_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, synced = Event(), []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        stop.set()

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(activations_module, "PIECE", 400)
    with pytest.raises(StoppedError):
        save_activations(tmp_path, 1, streams(), stop)
    assert len(synced) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]


@pytest.mark.parametrize("digest", ["xxh3_128", "sha256"])
def test_each_changed_byte_is_noticed(tmp_path: Path, digest: str) -> None:
    """`sha256`: as earlier versions of the program wrote it."""
    saved = save_activations(tmp_path, 1, streams(), Event())
    path = tmp_path / saved.file
    content = path.read_bytes()
    if digest == "sha256":
        saved = Activations(layers=1, file=saved.file, sha256=hashlib.sha256(content).hexdigest())
    assert is_same(load_activations(tmp_path, saved), streams())
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert load_activations(tmp_path, saved) is None
    path.write_bytes(content[:-1])
    assert load_activations(tmp_path, saved) is None


@pytest.mark.parametrize("changes", [{}, {"xxh3_128": ""}, {"sha256": "0" * 64}], ids=["none", "empty", "other"])
def test_a_file_without_its_digest_counts_as_damaged(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = save_activations(tmp_path, 1, streams(), Event()).file
    assert load_activations(tmp_path, Activations(layers=1, file=file, **changes)) is None


def test_the_newest_whole_file_is_taken(tmp_path: Path) -> None:
    saved = [save_activations(tmp_path, layers, streams(layers), Event()) for layers in (2, 5, 9)]
    (tmp_path / saved[2].file).write_bytes(b"")
    layers, tensors, lost = newest_activations(tmp_path, saved)
    assert (layers, lost) == (5, [saved[2].file])
    assert is_same(tensors, streams(5))
