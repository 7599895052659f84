"""`llm-barber plan`: the forecast of a run, and the settings that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_barber.cli import _main
from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.planning.forecast import Forecast
from llm_barber.planning.plan import plan
from llm_barber.planning.rates import KINDS
from llm_barber.settings.plan import PlanConfig
from llm_barber.text.calibration import token_shape
from tests.conftest import Listener, save_tokens
from tests.helpers.plans import LLAMA_8B, RATES


def test_a_plan_of_a_folder_a_file_and_a_named_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    forecasts: list[Forecast] = [
        plan(PlanConfig(model=str(place), flops=400e12, processes="1,2,4,8", preset="paper"))
        for place in (tmp_path, config)
    ]
    assert forecasts[0].runs == forecasts[1].runs
    assert [run.processes for run in forecasts[0].runs] == [1, 2, 4, 8]
    seconds = [run.seconds for run in forecasts[0].runs]
    assert seconds == sorted(seconds, reverse=True)
    assert forecasts[0].device == "cuda"
    assert not forecasts[0].measured
    # Twice the disk's bandwidth: half the time to read.
    fast = plan(PlanConfig(model=str(config), flops=400e12, bandwidth=4e9, link=1e18, preset="paper"))
    slow = plan(PlanConfig(model=str(config), flops=400e12, bandwidth=2e9, link=1e18, preset="paper"))
    reads = [
        next(stage for stage in forecast.runs[0].stages if stage.name == "read").seconds for forecast in (slow, fast)
    ]
    assert reads[0] == pytest.approx(2 * reads[1])
    assert plan(PlanConfig(model=str(config), flops=1e9, preset="paper")).runs[0].bottleneck == "compute"
    assert plan(PlanConfig(model=str(config), flops=1e18, bandwidth=1e6)).runs[0].bottleneck == "disk"


def test_a_gpu_that_is_too_small_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    listener = Listener()
    plan(PlanConfig(model=str(tmp_path), flops=400e12, device_memory="4GiB"), listener)
    assert any(
        line.startswith("--device-memory: the run needs ") and line.endswith("has 4.0 GiB")
        for line in listener.warnings
    )


def test_linears_that_are_left_out_are_counted_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    listener, silent = Listener(), Listener()
    complete = plan(PlanConfig(model=str(tmp_path), flops=400e12), silent)
    without = plan(PlanConfig(model=str(tmp_path), flops=400e12, exclude=("down_proj",)), listener)
    assert without.runs == complete.runs
    assert [line for line in listener.warnings if "counts every linear as pruned" in line]
    assert not silent.warnings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "/nothing/here"}, ModelError, "no such model: /nothing/here"),
        ({"processes": "0"}, SettingsError, "at least 1 process"),
        ({"processes": "two"}, SettingsError, "is not numbers with commas"),
        ({"processes": "8", "samples": 4}, SettingsError, "8 processes cannot share 4 windows"),
        ({"flops": -1}, SettingsError, "flops"),
        ({"memory_bandwidth": 1e12}, SettingsError, "give flops, too"),
        ({"link": 5e9}, SettingsError, "between processes it is network"),
        ({"network": float("inf")}, SettingsError, "network"),
        (
            {"memory": "1GiB", "flops": 1e12},
            SettingsError,
            "too little, even with all calibration activations",
        ),
        ({"pattern": "3:16", "sparsity": 0.5}, SettingsError, "exclude each other"),
        ({"pattern": "2:5", "flops": 1e12}, BarberError, "does not divide"),
        ({"seqlen": 10**6, "flops": 1e12}, BarberError, "beyond the model's 131072 positions"),
    ],
)
def test_refused_settings(tmp_path: Path, settings: dict[str, Any], error: type[BarberError], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    with pytest.raises(error, match=message) as caught:
        plan(PlanConfig(**{"model": str(tmp_path), **settings}))
    assert caught.value.hint


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    before = sorted(tmp_path.rglob("*"))
    assert _main(["plan", str(tmp_path), "--flops", "400e12", "--processes", "1,8", "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "8,030,261,248 parameters" in output
    assert "bottleneck" in output
    assert _main(["plan", str(tmp_path), "--flops", "400e12", "--json", "--quiet", "--preset", "best"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 8_030_261_248
    assert record["runs"][0]["bottleneck"] in set(KINDS.values())
    assert {stage["name"] for stage in record["runs"][0]["stages"]} >= {"embed", "allocate", "tune", "read", "write"}
    assert sorted(tmp_path.rglob("*")) == before


def test_this_machine_is_measured(llama: Path) -> None:
    forecast = plan(PlanConfig(model=str(llama), samples=4, seqlen=32))
    assert forecast.measured
    assert forecast.dtype in ("float32", "bfloat16")
    assert set(forecast.rates) == set(KINDS)
    assert all(rate > 0 for rate in forecast.rates.values())
    assert forecast.runs[0].device_memory is None
    assert forecast.runs[0].host_memory > 2**26


def test_a_file_of_tokens_sets_the_windows(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_barber.planning.plan.measured_rates", lambda *_: RATES)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    forecast = plan(PlanConfig(model=str(llama), calibration=str(tokens)))
    assert (forecast.sequences, forecast.tokens) == token_shape(tokens)
    with pytest.raises(SettingsError, match="5 processes cannot share 4 windows"):
        plan(PlanConfig(model=str(llama), calibration=str(tokens), processes=(5,)))
