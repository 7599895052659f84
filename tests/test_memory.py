"""A run within less memory gives the same bytes, and says when it cannot."""

from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, prune
from llm_barber.embedding import embed
from llm_barber.errors import SettingsError
from llm_barber.model import streams as streams_module
from llm_barber.plan import plan
from llm_barber.planning.memory import Held
from llm_barber.usage import current_memory
from tests.test_resume import weights


def run(model: Path, out: Path, tokens: Path, **settings: Any) -> None:
    prune(
        PruneConfig(
            model=model, output=out, calibration=tokens, dtype="float32", preset="mask", report=False, **settings
        )
    )


def test_activations_in_files_give_the_same_bytes(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "whole", tokens)
    from_file, sizes = streams_module.torch.from_file, []

    def counted(path: str, **how: Any) -> Any:
        assert Path(path).parent == tmp_path / "small.partial"
        sizes.append(how["size"])
        return from_file(path, **how)

    monkeypatch.setattr(streams_module.torch, "from_file", counted)
    monkeypatch.setattr("llm_barber.memory.current_memory", lambda: 2**20)
    monkeypatch.setattr("llm_barber.memory.peak_held", lambda *_: Held())
    run(llama, tmp_path / "small", tokens, memory=2**20 + 20_000)
    assert len(sizes) > 5
    assert weights(tmp_path / "small") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "paper"},
        {"preset": "paper", "rebuild": False},
        {"preset": "mask"},
        {"preset": "mask", "target_mix": 0},
        {"preset": "best", "refine": "swaps"},
        {"preset": "mask", "refine": "swaps", "guard": 0},
    ],
    ids=str,
)
def test_the_plan_knows_the_activations(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = PruneConfig(
        model=llama, output=tmp_path / "out", calibration=tokens, dtype="float32", report=False, **settings
    )
    kept: list[Any] = []

    def noted(*given: Any) -> Any:
        kept.extend([embed(*given), given[-1]])
        return kept[0]

    monkeypatch.setattr("llm_barber.run.embed", noted)
    planned = plan(config).stream_bytes
    prune(config)
    assert kept[1].used == planned


def test_what_is_needed_besides_activations_is_said(tmp_path: Path, llama: Path, tokens: Path) -> None:
    with pytest.raises(SettingsError, match="not enough, with all calibration activations in files") as caught:
        run(llama, tmp_path / "out", tokens, memory="1MiB")
    least = float(caught.value.hint.split()[3])
    assert 0.9 * current_memory() < least * 2**30 < 1.2 * current_memory() + 2**27
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("given", "size"),
    [("8GiB", 2**33), ("500MB", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("123", 123), (77, 77), (None, None)],
)
def test_sizes_are_read(given: Any, size: int | None) -> None:
    assert PruneConfig(model="model", output="out", memory=given).memory == size


@pytest.mark.parametrize("given", ["much", "8 gigs", "0", "-1GiB"])
def test_other_sizes_are_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="is not a size, like 8GiB"):
        PruneConfig(model="model", output="out", memory=given)
