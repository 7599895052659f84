"""Wrong settings are refused, and useless ones told of, before a model is looked for on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_barber import (
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    PruneConfig,
    RebuildConfig,
    compare,
    evaluate,
    inspect,
    prune,
    rebuild,
)
from llm_barber.checkpoint import hub
from llm_barber.errors import BarberError, SettingsError
from tests.conftest import Listener

HUB_ID = "someone/model"


@pytest.fixture
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any) -> Path:
        raise AssertionError("a download began")

    monkeypatch.setattr(hub, "_download", download)


@pytest.mark.usefixtures("_no_download")
@pytest.mark.parametrize(
    ("call", "kind", "settings", "message"),
    [
        (prune, PruneConfig, {"model": HUB_ID, "calibration": "typo.txt"}, "no such calibration text: typo.txt"),
        (rebuild, RebuildConfig, {"dense": HUB_ID, "pruned": "./nothere"}, "no such model: ./nothere"),
        (compare, CompareConfig, {"model": HUB_ID, "calibration": "typo.txt"}, "no such calibration text: typo.txt"),
        (compare, CompareConfig, {"model": HUB_ID, "text": ("typo.txt",)}, "no such text: typo.txt"),
        (compare, CompareConfig, {"model": HUB_ID, "device": "cuda:7"}, "device cuda:7: PyTorch sees"),
    ],
)
def test_wrong_settings(
    tmp_path: Path, call: Callable[..., Any], kind: type[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BarberError, match=message):
        call(kind(**settings, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_download")
def test_a_wrong_text_and_the_output_of_another_command(tmp_path: Path) -> None:
    with pytest.raises(BarberError, match=r"no such text: typo.txt"):
        evaluate(EvaluateConfig(model=HUB_ID, text=("typo.txt",)))
    (tmp_path / "mine").touch()
    with pytest.raises(BarberError, match="was not made by this command"):
        compare(CompareConfig(model=HUB_ID, output=tmp_path))


def test_settings_that_count_for_nothing_are_told_of(tmp_path: Path, llama: Path, tokens: Path) -> None:
    progress = Listener()
    settings = {"model": str(llama), "output": tmp_path / "out", "calibration": str(tokens), "device": "cpu"}
    prune(PruneConfig(**settings, initial="magnitude", revision="main", activations_off_device=True), progress)
    inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(llama), dense_revision="main"), progress)
    unused = [text for text in progress.warnings if "counts for nothing" in text]
    assert unused == [
        "--activations-off-device counts for nothing without a GPU",
        f"--revision main counts for nothing: {llama} is not a hub id",
        f"--dense-revision main counts for nothing: {llama} is not a hub id",
    ]


def test_settings_that_need_another_are_refused() -> None:
    with pytest.raises(SettingsError, match="--dense-revision needs --dense"):
        InspectConfig(model="pruned", dense_revision="main")
    with pytest.raises(SettingsError, match="allow-dense-tail needs N:M, from --pattern or --sparsities"):
        PruneConfig(model="model", output="out", allow_dense_tail=True)
    PruneConfig(model="model", output="out", allow_dense_tail=True, sparsities={"mlp": "2:4"})
