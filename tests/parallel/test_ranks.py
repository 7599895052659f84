"""Several processes get the masks of one process; runs resume with other numbers of processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.errors import OutputError
from llm_barber.method import distance
from llm_barber.parallel import pulse
from llm_barber.parallel.ranks import Ranks, joined
from llm_barber.run import stream as run_module
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.ranks import REFUSED, free_port, run_ranks
from tests.helpers.released import REBUILT, make_pruned, rebuild_as_released, released_id
from tests.helpers.runs import SETTINGS, read_untimed_files

DIED = 9


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", num_hidden_layers=3)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., RunReport]:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)

    def call(out: str, **settings: Any) -> RunReport:
        return prune(PruneConfig(model=model, output=tmp_path / out, calibration=tokens, **{**SETTINGS, **settings}))

    return call


@pytest.mark.parametrize(
    "settings",
    [
        {"initial": "wanda", "granularity": "block", "rebuild_ratio": 0.1},
        {"initial": "sparsegpt", "pattern": "2:4", "rebuild_ratio": 0.1},
        {"initial": "dsnot", "rebuild": False},
        {"initial": "magnitude", "granularity": "block", "rebuild_ratio": 0.1},
        {"initial": "ria", "rebuild": False},
        {"preset": "mask", "refine": "swaps", "guard": 0.34},
        {"preset": "mask", "refine": "swaps", "allocation": "owl", "guard": 0},
    ],
    ids=["rebuild", "sparsegpt", "dsnot", "magnitude", "ria", "swaps", "owl"],
)
def test_masks_are_those_of_one_process(tmp_path: Path, run: Callable[..., RunReport], settings: Any) -> None:
    alone = run("alone", **settings)
    one = read_folder(tmp_path / "alone")
    for count in (2, 4):
        assert run_ranks(count, lambda _, count=count: run(f"by{count}", **settings)) == [0] * count
        several = read_folder(tmp_path / f"by{count}")
        other = {name: int((one[name] != several[name]).sum()) for name in one}
        assert not any(other.values()), {name: number for name, number in other.items() if number}
        record = RunReport.model_validate_json((tmp_path / f"by{count}" / "barber.json").read_bytes())
        assert record.processes == count
        errors = [[block.error_after for layer in each.layers for block in layer.blocks] for each in (alone, record)]
        assert errors[1] == (errors[0] if None in errors[0] else pytest.approx(errors[0], rel=1e-3))


@pytest.mark.parametrize("count", [2, 4])
def test_masks_are_the_released_ones(tmp_path: Path, count: int) -> None:
    cases = REBUILT[count // 2 :: 10]
    for path in cases:
        make_pruned(path, tmp_path / f"{released_id(path)}-pruned")

    def work(_: int) -> None:
        for path in cases:
            rebuild_as_released(path, tmp_path / f"{released_id(path)}-pruned", tmp_path / released_id(path))

    assert run_ranks(count, work) == [0] * count
    for path in cases:
        written = read_folder(tmp_path / released_id(path))
        for name, keep in load_file(path).items():
            assert torch.equal(written[name.removesuffix(".keep") + ".weight"] != 0, keep.bool()), (path, name)


def test_torchrun_of_the_command_line(tmp_path: Path, run: Callable[..., RunReport]) -> None:
    run("alone", preset="paper")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
        "llm_barber", "prune", str(tmp_path / "dense"), str(tmp_path / "together"), "--calibration",
        str(tmp_path / "tokens.safetensors"), "--preset", "paper", "--dtype", "float32", "--batch-size", "2", "--quiet",
        "--no-report", "--json",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    assert RunReport.model_validate_json(found.stdout).processes == 2
    assert read_untimed_files(tmp_path / "together") == read_untimed_files(tmp_path / "alone")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["mask", "best"])
def test_tuning_together(
    tmp_path: Path, run: Callable[..., RunReport], preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes make the same steps, with sums that do not depend on the order: all bits are equal."""
    monkeypatch.setattr(distance, "HUGE", 1.0)  # so that half of the channels count for less, by all windows
    settings = {"preset": preset, "guard": 0.34, "tune_passes": 4, "dtype": dtype}
    alone = run("alone", **settings)
    one = read_folder(tmp_path / "alone")
    for count in (2, 4):
        assert run_ranks(count, lambda _, count=count: run(f"by{count}", **settings)) == [0] * count
        several = read_folder(tmp_path / f"by{count}")
        assert all(torch.equal(one[name], several[name]) for name in one)
        record = RunReport.model_validate_json((tmp_path / f"by{count}" / "barber.json").read_bytes())
        last = [report.layers[0].blocks[1].error_after for report in (alone, record)]
        assert last[1] == pytest.approx(last[0], rel=1e-3)


@pytest.mark.parametrize("lost", [False, True])
def test_one_that_dies_ends_all_and_the_run_goes_on_with_another_number(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """`lost`: the activations, so that all go through the finished layers once more."""
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
    for kept in (tmp_path / "resumed.partial").glob("activations-*") if lost else ():
        kept.unlink()
    assert run_ranks(2, lambda _: run("resumed", **settings, resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(pulse, "BEAT", 0.1)
    monkeypatch.setattr(pulse, "SILENCE", 2.0)
    return 2.0


def test_one_that_is_silent_ends_all(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch, short_silence: float, capfd: Any
) -> None:
    """A stopped process keeps its connections, as one does whose machine vanished."""
    run("whole")
    prune_layer = run_module.prune_layer

    def stopping(job: Any, index: int, *rest: Any) -> Any:
        if index == 2 and job.ranks.rank == 1:
            stopped = os.getpid()
            if os.fork() == 0:  # by whom the test gets rid of it
                time.sleep(3 * short_silence)
                os.kill(stopped, signal.SIGKILL)
                os._exit(0)
            os.kill(stopped, signal.SIGSTOP)
        return prune_layer(job, index, *rest)

    monkeypatch.setattr(run_module, "prune_layer", stopping)
    assert run_ranks(3, lambda _: run("resumed")) == [pulse.EXIT_CODE, -signal.SIGKILL, pulse.EXIT_CODE]
    told = capfd.readouterr().err
    for rank in (0, 2):
        assert f"error: process {rank} has heard nothing of process 1 for 2 s\nhint: " in told
    monkeypatch.setattr(run_module, "prune_layer", prune_layer)
    assert run_ranks(2, lambda _: run("resumed", resume=True)) == [0, 0]
    assert read_untimed_files(tmp_path / "resumed") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("slow", [0, 1])
def test_one_that_is_slow_is_waited_for(slow: int, short_silence: float) -> None:
    """Other processes wait within a run, and between two runs of a program."""

    def work(rank: int) -> None:
        with joined():
            time.sleep(1.5 * short_silence * (rank == slow))
        time.sleep(1.5 * short_silence * (rank == slow))
        with joined() as ranks:
            assert ranks.total(1) == [2]

    assert run_ranks(2, work) == [0, 0]


def test_those_that_are_stopped_together_go_on(tmp_path: Path, short_silence: float) -> None:
    def stop_and_go_on(processes: list[int]) -> None:
        for signalled, pause in ((signal.SIGSTOP, 1.5 * short_silence), (signal.SIGCONT, 0)):
            for process in processes:
                os.kill(process, signalled)
            time.sleep(pause)
        (tmp_path / "both went on").touch()

    def work(rank: int) -> None:
        with joined() as ranks:
            own, first = os.getpid(), ranks.from_first(os.getpid())
            ranks.wait()
            time.sleep(0.5)  # each has heard the other
            if rank and os.fork() == 0:
                try:
                    stop_and_go_on([first, own])
                finally:
                    os._exit(0)  # whatever happened: the group is not this process's to leave
            deadline = time.monotonic() + 60
            while not (tmp_path / "both went on").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)

    assert run_ranks(2, work) == [0, 0]


def test_one_that_fails_at_its_end_is_missed(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with joined():
            if rank == 0:
                raise OutputError("the disk is full", "")

    assert run_ranks(2, work, tmp_path) == [REFUSED, REFUSED]
    assert "RankError: another process of the run has ended" in (tmp_path / "1").read_text()


def test_one_that_fails_ends_others_that_notice_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_silence: float, capfd: Any
) -> None:
    """As those do that wait in a kernel of NCCL."""
    monkeypatch.setattr(pulse, "SILENCE", 60.0)
    monkeypatch.setattr(pulse, "GRACE", 0.5)

    def work(rank: int) -> None:
        with joined() as ranks:
            ranks.wait()
            if rank == 1:
                raise OutputError("the disk is full", "")
            time.sleep(20)

    began = time.monotonic()
    assert run_ranks(3, work, tmp_path) == [pulse.EXIT_CODE, REFUSED, pulse.EXIT_CODE]
    assert time.monotonic() - began < 15
    told = capfd.readouterr().err
    for rank in (0, 2):
        assert f"error: process {rank} cannot go on: process 1 failed\nhint: look for its message; the run goes" in told


def test_after_a_run_in_which_all_failed_comes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT", 0.1)
    monkeypatch.setattr(pulse, "GRACE", 0.5)

    def work(_: int) -> None:
        with pytest.raises(OutputError), joined() as ranks:
            ranks.wait()
            raise OutputError("exists", "")
        with joined() as ranks:
            time.sleep(1.5)
            assert ranks.total(1) == [2]

    assert run_ranks(2, work, tmp_path) == [0, 0]


def test_a_group_without_the_cpu_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        torch.distributed.init_process_group("cuda:gloo")
        # Process 0 answers for the group's addresses: it ends only when the other one has asked for them.
        (tmp_path / f"{rank}.connected").touch()
        while not all((tmp_path / f"{other}.connected").exists() for other in range(2)):
            time.sleep(0.01)
        with joined():
            pass

    assert run_ranks(2, work, tmp_path) == [REFUSED, REFUSED]
    assert "SettingsError: the program's group of processes has no backend for the CPU" in (tmp_path / "0").read_text()


@pytest.mark.parametrize(("sequences", "held_out"), [(128, 16), (16, 2), (7, 3), (5, 4), (6, 0), (3, 1)])
def test_each_has_its_part_of_what_is_held_out_and_of_the_rest(sequences: int, held_out: int) -> None:
    for count in range(1, min(sequences, 9)):
        found = [Ranks(rank, count).shares(sequences, held_out) for rank in range(count)]
        every = list(range(sequences))
        assert [one for share, _ in found for one in every[share]] == every[: sequences - held_out]
        assert [one for _, share in found for one in every[share]] == every[sequences - held_out :]
        sizes = [[len(every[share]) for share in shares] for shares in found]
        assert all(sum(one) in (sequences // count, -(-sequences // count)) for one in sizes)
        for part, whole in zip(zip(*sizes, strict=True), (sequences - held_out, held_out), strict=True):
            assert max(part) - min(part) <= (1 if whole % count == sequences % count == 0 else 2)


def test_more_processes_than_windows_are_refused(tmp_path: Path, run: Callable[..., RunReport]) -> None:
    assert set(run_ranks(7, lambda _: run("out"), tmp_path)) == {REFUSED}
    assert (tmp_path / "0").read_text() == "SettingsError: 7 processes for 6 calibration windows"
    assert not (tmp_path / "out").exists()
