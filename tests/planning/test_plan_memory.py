"""A plan's memory: calibration text, activations on the device, and activations in files."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llm_barber.planning.limits import DEVICE_LIBRARIES, DEVICE_MARGIN
from llm_barber.planning.plan import VOCABULARY_BYTES, plan
from llm_barber.settings.plan import PlanConfig
from llm_barber.text.calibration import READ_BYTES, READING_BYTES, token_shape
from tests.conftest import save_tokens
from tests.helpers.plans import LLAMA_8B, RATES


def test_text_takes_memory_and_a_file_of_tokens_does_not(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.planning.plan.current_memory", lambda: 2**28)
    monkeypatch.setattr("llm_barber.planning.plan.measured_rates", lambda *_: RATES)
    (tmp_path / "short.txt").write_text("a" * 1000)
    (tmp_path / "long.txt").write_text("a" * 10**7)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    seqlen = token_shape(tokens)[1]
    none, short, long = (
        plan(PlanConfig(model=str(llama), samples=4, seqlen=seqlen, calibration=str(text))).runs[0].host_memory
        for text in (tokens, tmp_path / "short.txt", tmp_path / "long.txt")
    )
    tokenizer = VOCABULARY_BYTES * AutoConfig.from_pretrained(llama).vocab_size
    assert short - none == tokenizer + READ_BYTES * 1000
    assert long == 2**28 + tokenizer + READING_BYTES * 10**7  # while it is read


def test_activations_stay_on_a_device_that_has_room(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def planned(memory: float) -> Any:
        settings: dict[str, Any] = {"preset": "paper", "batch_size": 1, "bandwidth": 1e18}
        return plan(PlanConfig(model=str(tmp_path), flops=400e12, device_memory=int(memory), **settings)).runs[0]

    array = 128 * 2048 * 4096 * 2  # bytes; a power of two, so that pinned memory takes no more
    small = planned(2**30)
    held = small.device_memory
    medium, large = planned(DEVICE_LIBRARIES + DEVICE_MARGIN * held + 1.5 * array), planned(80e9)
    assert (medium.device_memory - held, large.device_memory - held) == (array, 3 * array)
    assert (small.on_device, medium.on_device, large.on_device) == (0, array, 3 * array)
    # Off the device is, beside other arrays, what a layer started from, for as long as it is written.
    assert small.host_memory == medium.host_memory + array == large.host_memory + 3 * array
    link = [
        sum(stage.seconds_by_kind["link"] for stage in run.stages if stage.name in ("initial", "rebuild", "propagate"))
        for run in (small, medium, large)
    ]
    assert link[2] == 0
    assert link[1] == pytest.approx(2 / 3 * link[0])


def test_activations_beyond_the_memory_go_to_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def planned(**settings: Any) -> Any:
        forecast = plan(PlanConfig(model=str(tmp_path), flops=400e12, preset="mask", device_memory="8GiB", **settings))
        return forecast.runs[0]

    free, bound, plenty = planned(), planned(memory="8GiB"), planned(memory="1TiB")
    assert free.in_files == plenty.in_files == 0
    assert free.host_memory == plenty.host_memory > 10 * 2**30
    assert bound.host_memory <= 8 * 2**30
    assert bound.host_memory + bound.in_files == pytest.approx(free.host_memory, rel=0.2)
    read = [sum(stage.bytes_read for stage in run.stages) for run in (free, bound)]
    still_written = 2 * 128 * 2048 * 4096 * 2  # of both streams; nobody reads them
    assert read[1] > read[0] + 32 * (bound.in_files - still_written)  # once a layer at least
    assert bound.seconds > free.seconds
