"""Runs of several processes: they get the masks of a single process, and share its windows."""

import os
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
from llm_barber.method import distance
from llm_barber.parallel.ranks import Ranks, joined
from llm_barber.run import stream as run_module
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.ranks import REFUSED, free_port, run_ranks
from tests.helpers.released import REBUILT, make_pruned, rebuild_as_released, released_id
from tests.helpers.runs import SETTINGS, read_untimed_files


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
    report = run("alone", **settings)
    expected = read_folder(tmp_path / "alone")
    for count in (2, 4):
        assert run_ranks(count, lambda _, count=count: run(f"by{count}", **settings)) == [0] * count
        written = read_folder(tmp_path / f"by{count}")
        differences = {name: int((expected[name] != written[name]).sum()) for name in expected}
        assert not any(differences.values()), {name: number for name, number in differences.items() if number}
        record = RunReport.model_validate_json((tmp_path / f"by{count}" / "barber.json").read_bytes())
        assert record.processes == count
        alone, together = (
            [block.error_after for layer in result.layers for block in layer.blocks] for result in (report, record)
        )
        assert together == (alone if None in alone else pytest.approx(alone, rel=1e-3))


def test_all_processes_have_the_allocation_of_the_first(
    tmp_path: Path, run: Callable[..., RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices of several kinds round otherwise, so that each would find another one."""
    settings = {"initial": "wanda", "rebuild": False, "allocation": "loss"}
    run("alone", **settings)
    allocate = run_module.allocate

    def another(*arguments: Any) -> Any:
        sparsities = allocate(*arguments)
        if os.environ["RANK"] == "0":
            return sparsities
        return dict(zip(sparsities, reversed(sparsities.values()), strict=True))

    monkeypatch.setattr(run_module, "allocate", another)
    assert run_ranks(2, lambda _: run("together", **settings)) == [0, 0]
    expected, written = read_folder(tmp_path / "alone"), read_folder(tmp_path / "together")
    assert all(torch.equal(expected[name], written[name]) for name in expected)


@pytest.mark.parametrize(
    "settings", [{"initial": "wanda"}, {"preset": "mask", "refine": "swaps"}], ids=["wanda", "swaps"]
)
def test_experts_are_visited_in_another_order_by_each_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = make_model(tmp_path / "dense", "qwen3_moe", num_experts=8, num_experts_per_tok=2)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6, tokens=64)

    def run(out: str) -> RunReport:
        return prune(PruneConfig(model=model, output=tmp_path / out, calibration=tokens, **{**SETTINGS, **settings}))

    run("alone")
    assert run_ranks(2, lambda _: run("together")) == [0, 0]
    expected, written = read_folder(tmp_path / "alone"), read_folder(tmp_path / "together")
    differences = sum(int(((expected[name] != 0) != (written[name] != 0)).sum()) for name in expected)
    assert differences <= 0.001 * sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("count", [2, 4])
def test_masks_are_the_released_ones(tmp_path: Path, count: int) -> None:
    cases = REBUILT[count // 2 :: 10]
    for path in cases:
        make_pruned(path, tmp_path / f"{released_id(path)}-pruned")

    def rebuild_cases(_: int) -> None:
        for path in cases:
            rebuild_as_released(path, tmp_path / f"{released_id(path)}-pruned", tmp_path / released_id(path))

    assert run_ranks(count, rebuild_cases) == [0] * count
    for path in cases:
        written = read_folder(tmp_path / released_id(path))
        for name, keep in load_file(path).items():
            assert torch.equal(written[name.removesuffix(".keep") + ".weight"] != 0, keep.bool()), (path, name)


@pytest.mark.timeout(300)
def test_torchrun_of_the_command_line(tmp_path: Path, run: Callable[..., RunReport]) -> None:
    run("alone", preset="paper")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
        "llm_barber", "prune", str(tmp_path / "dense"), str(tmp_path / "together"), "--calibration",
        str(tmp_path / "tokens.safetensors"), "--preset", "paper", "--dtype", "float32", "--batch-size", "2", "--quiet",
        "--no-report", "--json",
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert RunReport.model_validate_json(process.stdout).processes == 2
    assert read_untimed_files(tmp_path / "together") == read_untimed_files(tmp_path / "alone")


@pytest.mark.parametrize(("preset", "dtype"), [("mask", "float32"), ("best", "bfloat16")])
def test_tuning_together(
    tmp_path: Path, run: Callable[..., RunReport], preset: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bits are equal: processes make the same steps, and their sums do not depend on the order."""
    monkeypatch.setattr(
        distance, "HUGE_CHANNEL", 1.0
    )  # half of the channels count for less; the windows of all decide which
    settings = {"preset": preset, "guard": 0.34, "tune_passes": 4, "dtype": dtype}
    settings["tune_windows"] = 4 if dtype == "float32" else 1  # which processes share, or wait for
    report = run("alone", **settings)
    expected = read_folder(tmp_path / "alone")
    for count in (2, 4):
        assert run_ranks(count, lambda _, count=count: run(f"by{count}", **settings)) == [0] * count
        written = read_folder(tmp_path / f"by{count}")
        assert all(torch.equal(expected[name], written[name]) for name in expected)
        record = RunReport.model_validate_json((tmp_path / f"by{count}" / "barber.json").read_bytes())
        last_error = record.layers[0].blocks[1].error_after
        assert last_error == pytest.approx(report.layers[0].blocks[1].error_after, rel=1e-3)


def test_a_group_without_the_cpu_is_refused(tmp_path: Path) -> None:
    def join_without_cpu(rank: int) -> None:
        torch.distributed.init_process_group("cuda:gloo")
        # Process 0 serves the group's addresses, and must not end before process 1 has read them.
        (tmp_path / f"{rank}.connected").touch()
        while not all((tmp_path / f"{other}.connected").exists() for other in range(2)):
            time.sleep(0.01)
        with joined():
            pass

    assert run_ranks(2, join_without_cpu, tmp_path) == [REFUSED, REFUSED]
    assert "SettingsError: the program's group of processes has no backend for the CPU" in (tmp_path / "0").read_text()


@pytest.mark.parametrize(("sequences", "held_out"), [(128, 16), (16, 2), (7, 3), (5, 4), (6, 0), (3, 1)])
def test_held_out_and_other_windows_are_shared_among_processes(sequences: int, held_out: int) -> None:
    for count in range(1, min(sequences, 9)):
        shares = [Ranks(rank, count).shares(sequences, held_out) for rank in range(count)]
        indices = list(range(sequences))
        assert [index for share, _ in shares for index in indices[share]] == indices[: sequences - held_out]
        assert [index for _, share in shares for index in indices[share]] == indices[sequences - held_out :]
        sizes = [[len(indices[share]) for share in pair] for pair in shares]
        assert all(sum(pair) in (sequences // count, -(-sequences // count)) for pair in sizes)
        for parts, whole in zip(zip(*sizes, strict=True), (sequences - held_out, held_out), strict=True):
            assert max(parts) - min(parts) <= (1 if whole % count == sequences % count == 0 else 2)


def test_more_processes_than_windows_are_refused(tmp_path: Path, run: Callable[..., RunReport]) -> None:
    assert set(run_ranks(7, lambda _: run("out"), tmp_path)) == {REFUSED}
    assert (tmp_path / "0").read_text() == "SettingsError: 7 processes for 6 calibration windows"
    assert not (tmp_path / "out").exists()
