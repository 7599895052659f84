"""Batches that are copied before they are asked for are what they would be if they were copied then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_barber import PruneConfig, prune
from llm_barber.model.ahead import BatchesAhead, Copied
from llm_barber.model.streams import ActivationStreams
from tests.test_resume import weights


class Snapshots:
    """Copies at once, as the worst case of a copy in the background: what is written later is not in it."""

    def __init__(self) -> None:
        self.started, self.waited = 0, 0

    def start(self, values: Tensor) -> Copied:
        self.started += 1
        return values.clone(), None

    def wait(self, copied: Copied) -> Tensor:
        self.waited += 1
        return copied[0]


def test_guesses_the_next_batch_and_forgets_what_changes() -> None:
    copier = Snapshots()
    ahead, array = BatchesAhead(copier), torch.arange(7.0)
    for start in (0, 2, 4, 6):
        batch = slice(start, min(start + 2, 7))
        assert torch.equal(ahead.read("a", array, batch), array[batch])
    assert (copier.started, copier.waited) == (4, 4)  # each once: the guesses were right, none goes beyond the end
    ahead.read("a", array, slice(0, 2))
    array[1] = -1
    ahead.forget("a", slice(0, 2))  # not the rows that are coming
    assert ahead.read("a", array, slice(2, 4)).tolist() == [2, 3]
    array[4:6] = -1
    ahead.forget("a", slice(3, 5))
    assert ahead.read("a", array, slice(4, 6)).tolist() == [-1, -1]
    ahead.read("a", array, slice(0, 2))
    other = torch.zeros(7)
    ahead.forget("a")
    assert ahead.read("a", other, slice(2, 4)).tolist() == [0, 0]
    assert ahead.read("a", other, slice(0, 1)).tolist() == [0]  # a wrong guess
    assert ahead.read("b", array, slice(1, 2)).tolist() == [-1]


@pytest.mark.parametrize(
    "settings",
    [{"initial": "wanda", "rebuild_ratio": 0.5}, {"preset": "mask"}, {"preset": "best"}, {"allocation": "owl"}],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_a_run_gives_the_same_bytes(
    tmp_path: Path, llama: Path, tokens: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "model": llama,
        "calibration": tokens,
        "dtype": "float32",
        "batch_size": 1,
        "report": False,
        **settings,
    }
    prune(PruneConfig(output=tmp_path / "plain", **given))
    copier, init = Snapshots(), ActivationStreams.__init__

    def with_ahead(streams: ActivationStreams, *arguments: Any, **keywords: Any) -> None:
        init(streams, *arguments, **keywords)
        streams._ahead = BatchesAhead(copier)

    monkeypatch.setattr(ActivationStreams, "__init__", with_ahead)
    prune(PruneConfig(output=tmp_path / "ahead", **given))
    assert weights(tmp_path / "ahead") == weights(tmp_path / "plain")
    assert copier.started < 1.5 * copier.waited  # most guesses are right
