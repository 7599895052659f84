"""Batches that are read ahead, and results that are written late, hold the right values."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.model.copies import READS_AHEAD, Copies, SideStreams
from tests.conftest import save_tokens
from tests.helpers.copies import LateCopier, use_copier
from tests.helpers.runs import read_untimed_files


def test_guesses_the_next_batch_and_forgets_what_changes() -> None:
    copier = LateCopier()
    copies, array = Copies(copier), torch.arange(7.0)
    for start in (0, 2, 4, 6):
        batch = slice(start, min(start + 2, 7))
        assert torch.equal(copies.read("a", array, batch), array[batch])
    assert (copier.started, copier.waited) == (4, 4)  # each once: the guesses were right, none goes beyond the end
    copies.read("a", array, slice(0, 2))
    copies.write("a", array, slice(1, 2), torch.tensor([-1.0]))  # not of the rows that are coming
    assert copies.read("a", array, slice(2, 4)).tolist() == [2, 3]
    copies.write("a", array, slice(3, 5), torch.tensor([-3.0, -4.0]))
    assert copies.read("a", array, slice(4, 6)).tolist() == [-4, 5]
    copies.read("a", array, slice(0, 2))
    other = torch.zeros(7)
    copies.forget("a")
    assert copies.read("a", other, slice(2, 4)).tolist() == [0, 0]
    assert copies.read("a", other, slice(0, 1)).tolist() == [0]  # a wrong guess
    assert copies.read("b", array, slice(1, 2)).tolist() == [-1]


def test_guesses_that_the_next_batch_is_as_far_on_as_the_last() -> None:
    copier = LateCopier()
    copies, array = Copies(copier), torch.arange(12.0)
    for first in (1, 0, 2):  # each step takes every third
        for start in range(first, 12, 3):
            assert copies.read("a", array, slice(start, start + 1)).tolist() == [start]
    assert copier.started == 12 + 1  # only what follows the very first was not known
    copies.read("a", array, slice(0, 4))  # of another size: one after the other again
    copier.started = 0
    copies.read("a", array, slice(4, 8))
    assert copier.started == 1


def test_results_are_waited_for_once_they_are_asked_for() -> None:
    copier = LateCopier()
    copies, read, written = Copies(copier), torch.arange(6.0), torch.zeros(6)
    for start in (0, 2, 4):
        batch = slice(start, start + 2)
        copies.write("to", written, batch, copies.read("from", read, batch) + 1)
    assert copier.waited_back == 0
    assert not written.any()
    assert copies.read("to", written, slice(0, 6)).tolist() == [1, 2, 3, 4, 5, 6]
    copies.settle("to")
    assert copier.waited_back == 1
    copies.write("to", written, slice(0, 1), torch.tensor([-1.0]))
    copies.read("to", written, slice(2, 3))  # neither these rows nor those that are taken to follow
    assert copier.waited_back == 1
    copies.forget("to")
    assert written[0] == -1


@pytest.mark.parametrize(
    "settings",
    [{"initial": "wanda", "rebuild_ratio": 0.5}, {"preset": "mask"}, {"preset": "best"}, {"allocation": "owl"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_gives_the_same_bytes(
    tmp_path: Path, llama: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=11)
    options: dict[str, Any] = {
        "model": llama,
        "calibration": tokens,
        "dtype": "float32",
        "batch_size": 1,
        "report": False,
        **settings,
    }
    prune(PruneConfig(output=tmp_path / "plain", **options))
    copier = LateCopier()
    use_copier(copier, monkeypatch)
    prune(PruneConfig(output=tmp_path / "beside", **options))
    assert read_untimed_files(tmp_path / "beside") == read_untimed_files(tmp_path / "plain")
    assert copier.started < 1.5 * copier.waited  # most guesses are right
    assert copier.waited_back < copier.waited / 2  # and most results are on their way while others are computed


class Stream:
    """A CUDA stream that computes nothing before it is waited for."""

    waited: ClassVar[list[int]] = []  # numbers of the events that the process has waited for

    def __init__(self) -> None:
        self.events = 0

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self) -> Any:
        self.events += 1
        return SimpleNamespace(synchronize=partial(self.waited.append, self.events))


def test_a_process_is_not_far_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until the device has come to the read of `READS_AHEAD` reads ago, and for nothing younger."""
    present = Stream()
    monkeypatch.setattr(Stream, "waited", [])
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: present)
    streams = SideStreams(torch.device("cuda:0"))
    batch = SimpleNamespace(record_stream=lambda stream: None)
    for number in range(1, 8):
        assert streams.wait((batch, object())) is batch  # type: ignore[arg-type]
        assert Stream.waited == list(range(1, number - READS_AHEAD + 1))
