"""Runs of several processes in which a process dies, fails, is silent or is slow."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_barber import RunReport
from llm_barber.errors import OutputError
from llm_barber.parallel import pulse
from llm_barber.parallel.ranks import joined
from llm_barber.run import stream as run_module
from tests.helpers.ranks import REFUSED, agents_store, run_ranks
from tests.helpers.runs import read_untimed_files

DIED = 9


@pytest.mark.parametrize("lost", [False, True])
def test_a_dead_process_ends_all_and_the_run_resumes_with_another_number(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """`lost`: the activations are lost, so that processes pass through the finished layers again."""
    settings = {"preset": "mask", "refine": "swaps", "pattern": "2:4", "guard": 0}
    run("whole", **settings)
    prune_layer = run_module.prune_layer

    def dying(job: Any, index: int, *rest: Any) -> Any:
        if index == 2 and job.ranks.rank == 1:
            os._exit(DIED)
        return prune_layer(job, index, *rest)

    monkeypatch.setattr(run_module, "prune_layer", dying)
    began = time.monotonic()
    codes = run_ranks(3, lambda _: run("resumed", **settings), tmp_path)
    assert codes == [REFUSED, DIED, REFUSED]
    assert time.monotonic() - began < 60
    assert "RankError: another process of the run has ended" in (tmp_path / "0").read_text()
    monkeypatch.undo()
    assert not (tmp_path / "resumed").exists()
    for activations in (tmp_path / "resumed.partial").glob("activations-*") if lost else ():
        activations.unlink()
    assert run_ranks(2, lambda _: run("resumed", **settings, resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(pulse, "BEAT", 0.1)
    monkeypatch.setattr(pulse, "SILENCE", 2.0)
    return 2.0


def test_a_silent_process_ends_all(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch, short_silence: float, capfd: Any
) -> None:
    """A stopped process keeps its connections, as a process on a machine that vanished does."""
    run("whole")
    prune_layer = run_module.prune_layer

    def stopping(job: Any, index: int, *rest: Any) -> Any:
        if index == 2 and job.ranks.rank == 1:
            stopped = os.getpid()
            if os.fork() == 0:  # this process kills the stopped process later
                time.sleep(3 * short_silence)
                os.kill(stopped, signal.SIGKILL)
                os._exit(0)
            os.kill(stopped, signal.SIGSTOP)
        return prune_layer(job, index, *rest)

    monkeypatch.setattr(run_module, "prune_layer", stopping)
    assert run_ranks(3, lambda _: run("resumed")) == [pulse.EXIT_CODE, -signal.SIGKILL, pulse.EXIT_CODE]
    shown = capfd.readouterr().err
    for rank in (0, 2):
        assert f"error: process {rank} has heard nothing of process 1 for 2 s\nhint: " in shown
    monkeypatch.setattr(run_module, "prune_layer", prune_layer)
    assert run_ranks(2, lambda _: run("resumed", resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


def test_a_process_that_falls_silent_at_once_ends_all(monkeypatch: pytest.MonkeyPatch, short_silence: float) -> None:
    """It is heard a single time."""
    monkeypatch.setattr(pulse, "BEAT", 1.0)

    def stop_at_once(rank: int) -> None:
        with joined() as ranks:
            if rank == 1:
                stopped = os.getpid()
                time.sleep(0.3 * pulse.BEAT)
                if os.fork() == 0:
                    time.sleep(3 * short_silence)
                    os.kill(stopped, signal.SIGKILL)
                    os._exit(0)
                os.kill(stopped, signal.SIGSTOP)
            ranks.total(1)

    assert run_ranks(2, stop_at_once) == [pulse.EXIT_CODE, -signal.SIGKILL]


def test_processes_that_torchrun_starts_anew_meet(monkeypatch: pytest.MonkeyPatch, short_silence: float) -> None:
    """Torchrun's store outlives them, and has what the earlier processes wrote: that one of them failed."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def fail(rank: int) -> None:
        with joined() as ranks:
            ranks.wait()
            time.sleep(0.5)  # until each process has heard the other
            raise OutputError(f"process {rank} failed", "start it anew")

    def go_on(_: int) -> None:
        with joined() as ranks:
            time.sleep(2.0)  # until a failure would have been noticed
            assert ranks.total(1) == [2]

    with agents_store() as port:
        assert run_ranks(2, fail, port=port) == [REFUSED, REFUSED]
        monkeypatch.setattr(pulse, "GRACE", 0.3)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert run_ranks(2, go_on, port=port) == [0, 0]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_process_is_waited_for(slow: int, short_silence: float) -> None:
    """Other processes wait within a run, and between two runs of a program."""

    def run_twice(rank: int) -> None:
        with joined():
            time.sleep(1.5 * short_silence * (rank == slow))
        time.sleep(1.5 * short_silence * (rank == slow))
        with joined() as ranks:
            assert ranks.total(1) == [2]

    assert run_ranks(2, run_twice) == [0, 0]


def test_processes_that_are_stopped_together_go_on(tmp_path: Path, short_silence: float) -> None:
    def stop_and_go_on(processes: list[int]) -> None:
        for signalled, pause in ((signal.SIGSTOP, 1.5 * short_silence), (signal.SIGCONT, 0)):
            for process in processes:
                os.kill(process, signalled)
            time.sleep(pause)
        (tmp_path / "both went on").touch()

    def stop_both(rank: int) -> None:
        with joined() as ranks:
            this_process, first = os.getpid(), ranks.from_first(os.getpid())
            ranks.wait()
            time.sleep(0.5)  # until each process has heard the other
            if rank and os.fork() == 0:
                try:
                    stop_and_go_on([first, this_process])
                finally:
                    os._exit(0)  # even after an error: this child must not leave the group for its parent
            deadline = time.monotonic() + 60
            while not (tmp_path / "both went on").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)

    assert run_ranks(2, stop_both) == [0, 0]


def test_a_process_that_fails_at_the_end_of_its_run_is_noticed(tmp_path: Path) -> None:
    def fail_first(rank: int) -> None:
        with joined():
            if rank == 0:
                raise OutputError("the disk is full", "")

    assert run_ranks(2, fail_first, tmp_path) == [REFUSED, REFUSED]
    assert "RankError: another process of the run has ended" in (tmp_path / "1").read_text()


def test_a_failed_process_ends_processes_that_cannot_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_silence: float, capfd: Any
) -> None:
    """Processes that wait in a kernel of NCCL do not notice."""
    monkeypatch.setattr(pulse, "SILENCE", 60.0)
    monkeypatch.setattr(pulse, "GRACE", 0.5)

    def fail_second(rank: int) -> None:
        with joined() as ranks:
            ranks.wait()
            if rank == 1:
                raise OutputError("the disk is full", "")
            time.sleep(20)

    began = time.monotonic()
    assert run_ranks(3, fail_second, tmp_path) == [pulse.EXIT_CODE, REFUSED, pulse.EXIT_CODE]
    assert time.monotonic() - began < 15
    shown = capfd.readouterr().err
    for rank in (0, 2):
        assert (
            f"error: process {rank} cannot go on: process 1 failed\nhint: look for its message; the run goes" in shown
        )


def test_a_run_follows_a_run_in_which_all_processes_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT", 0.1)
    monkeypatch.setattr(pulse, "GRACE", 0.5)

    def fail_and_run_again(_: int) -> None:
        with pytest.raises(OutputError), joined() as ranks:
            ranks.wait()
            raise OutputError("exists", "")
        with joined() as ranks:
            time.sleep(1.5)
            assert ranks.total(1) == [2]

    assert run_ranks(2, fail_and_run_again, tmp_path) == [0, 0]
