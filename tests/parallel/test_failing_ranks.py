"""Runs of several processes in which a process dies or fails."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_barber import RunReport
from llm_barber.errors import OutputError
from llm_barber.parallel.ranks import joined
from llm_barber.run import stream as run_module
from tests.helpers.ranks import REFUSED, run_ranks
from tests.helpers.runs import read_untimed_files

DIED = 9


def test_a_dead_process_ends_all_and_the_run_resumes_with_another_number(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"preset": "mask", "refine": "swaps", "pattern": "2:4", "guard": 0}
    run("whole", **settings)
    prune_layer = run_module.prune_layer

    def dying(job: Any, index: int, *rest: Any) -> Any:
        if index == 2 and job.ranks.rank == 1:
            os._exit(DIED)
        return prune_layer(job, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prune_layer", dying)
        assert run_ranks(3, lambda _: run("resumed", **settings), tmp_path) == [REFUSED, DIED, REFUSED]
    assert "RankError: another process of the run has ended" in (tmp_path / "0").read_text()
    assert not (tmp_path / "resumed").exists()
    assert run_ranks(2, lambda _: run("resumed", **settings, resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


def test_updated_weights_reach_all_processes_of_a_run_that_goes_on(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"initial": "sparsegpt", "rebuild": False, "pattern": "2:4"}
    run("whole", **settings)
    whole = run_module.prune_layer
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run_module, "prune_layer", lambda job, index, *rest: whole(job, index // (1 - index), *rest))
        run("resumed", **settings)
    assert run_ranks(2, lambda _: run("resumed", **settings, resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


def test_a_process_that_fails_at_the_end_of_its_run_is_noticed(tmp_path: Path) -> None:
    def fail_first(rank: int) -> None:
        with joined():
            if rank == 0:
                raise OutputError("the disk is full", "")

    assert run_ranks(2, fail_first, tmp_path) == [REFUSED, REFUSED]
    assert "RankError: another process of the run has ended" in (tmp_path / "1").read_text()


def test_a_run_follows_a_run_in_which_all_processes_failed(tmp_path: Path) -> None:
    def fail_and_run_again(_: int) -> None:
        with pytest.raises(OutputError), joined() as ranks:
            ranks.wait()
            raise OutputError("exists", "")
        with joined() as ranks:
            assert ranks.total(1) == [2]

    assert run_ranks(2, fail_and_run_again, tmp_path) == [0, 0]
