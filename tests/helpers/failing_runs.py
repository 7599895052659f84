"""Runs that are refused: the message says why, and no file is changed."""

from pathlib import Path

import pytest

from llm_barber import BarberError, PruneConfig, prune


def expect_failure(message: str, kind: type[BarberError], tmp_path: Path, **settings: object) -> BarberError:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message) as caught:
        prune(PruneConfig(**{"output": tmp_path / "out", **settings}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert caught.value.hint
    return caught.value
