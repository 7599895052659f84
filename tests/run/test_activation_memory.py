"""A run within less memory gives the same bytes, and says when it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.errors import SettingsError
from llm_barber.model import streams as streams_module
from llm_barber.parallel.ranks import Ranks
from llm_barber.progress import Silent
from llm_barber.run.activation_memory import activation_memory
from llm_barber.run.commands import prepare_prune
from llm_barber.run.dry_run import dry_run
from llm_barber.run.stream import _embed
from llm_barber.text.calibration import text_size
from llm_barber.usage import current_memory
from tests.conftest import make_model, save_tokens
from tests.helpers.runs import read_untimed_files


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
    monkeypatch.setattr("llm_barber.run.activation_memory.least_memory", lambda _: 2**20)
    run(llama, tmp_path / "small", tokens, memory=2**20 + 20_000)
    assert len(sizes) > 5
    assert read_untimed_files(tmp_path / "small") == read_untimed_files(tmp_path / "whole")


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
def test_a_dry_run_knows_the_activations(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = PruneConfig(
        model=llama, output=tmp_path / "out", calibration=tokens, dtype="float32", report=False, **settings
    )
    kept: list[Any] = []

    def noted(*arguments: Any) -> Any:
        kept.extend(_embed(*arguments))
        return tuple(kept)

    monkeypatch.setattr("llm_barber.run.stream._embed", noted)
    planned = dry_run(config).stream_bytes
    prune(config)
    assert kept[0].memory.used == planned


BOUND = """
import json, os, re, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from llm_barber import PruneConfig, prune
from llm_barber.run import activation_memory
from llm_barber.errors import SettingsError

def private():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def watch():
    global peak
    while True:
        peak = max(peak, private())
        time.sleep(0.002)

peak = 0
activation_memory.current_memory, activation_memory.LIBRARIES = private, 0
for number, settings in enumerate(json.loads(sys.argv[1])):
    if os.fork():  # a process for each, whose memory nothing has used before
        if status := os.wait()[1]:
            sys.exit(f"run {number} ended with status {status}")
        continue
    settings = {"output": f"{sys.argv[2]}/{number}", "report": False, "memory": 1, **settings}
    try:
        prune(PruneConfig(**settings))
    except SettingsError as error:  # what is refused leaves some memory in use: the hint has room for that
        settings["memory"] = error.hint.split()[3] + "GiB"
    threading.Thread(target=watch, daemon=True).start()
    prune(PruneConfig(**settings))
    print(json.dumps([peak, PruneConfig(**settings).memory]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.timeout(300)
def test_the_least_memory_that_is_accepted_is_enough(tmp_path: Path) -> None:
    """Private memory stays within the limit, for models whose layers are large against all else."""
    wide = {"vocab_size": 256, "max_position_embeddings": 64, "num_hidden_layers": 3}
    llama = {**wide, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    models = {
        "gpt2": make_model(tmp_path / "gpt2", "gpt2", **{**wide, "n_embd": 640, "n_layer": 3, "n_head": 8}),
        "llama": make_model(tmp_path / "llama", "llama", **llama),
        "qwen3_moe": make_model(
            tmp_path / "qwen3_moe", "qwen3_moe", **{**llama, "num_experts": 8, "moe_intermediate_size": 512}
        ),
    }
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4, tokens=32, vocabulary=256)
    runs = [
        {"model": "gpt2", "preset": "paper", "initial": "sparsegpt", "keep_updates": True},
        {"model": "llama", "preset": "mask", "refine": "swaps", "swaps": 2},
        {"model": "qwen3_moe", "preset": "paper"},
    ]
    run_settings = [
        {"dtype": "float32", "calibration": str(tokens), **run, "model": str(models[str(run["model"])])} for run in runs
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "500000"}  # what is let go of is given back
    command = [sys.executable, "-c", BOUND, json.dumps(run_settings), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for run, line in zip(runs, done.stdout.splitlines(), strict=True):
        peak, memory = json.loads(line)
        assert 0.5 * memory < peak <= memory, run


def test_a_text_that_is_too_long_to_read_is_told_of_before(tmp_path: Path, llama: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("a word " * 10**6)
    memory = current_memory() + 500 * 10**6
    with pytest.raises(SettingsError, match=r"not enough to read the 7 MB of calibration text .*long.txt") as caught:
        run(llama, tmp_path / "out", text, memory=memory, samples=4, seqlen=24)
    assert "1.15 kB are plenty for 4 windows of 24 tokens" in caught.value.hint
    compressed = tmp_path / "compressed.parquet"
    texts = [f"{number} a word " * 500 for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": [1] * 1000}), compressed)
    assert compressed.stat().st_size < 10**6 < 5 * 10**6 < text_size(str(compressed), 96) < 8 * 10**6
    with pytest.raises(SettingsError, match=r"not enough to read the .* MB of calibration text .*compressed.parquet"):
        run(llama, tmp_path / "out", compressed, memory=memory, samples=4, seqlen=24)
    assert text_size("wikitext2", 96) > 10**7  # it is read whole


def test_a_dry_run_says_what_memory_lacks(tmp_path: Path, llama: Path, tokens: Path) -> None:
    config = PruneConfig(model=str(llama), output=tmp_path / "out", calibration=str(tokens), memory="1MiB")
    with pytest.raises(SettingsError, match="too little, even with all calibration activations in files") as caught:
        dry_run(config)
    accepted = dry_run(config.model_copy(update={"memory": int(float(caught.value.hint.split()[3]) * 2**30)}))
    assert dict(accepted.rows())["memory beside them"].startswith("at most ")


def test_what_is_needed_besides_activations_is_said(tmp_path: Path, llama: Path, tokens: Path) -> None:
    with pytest.raises(SettingsError, match="too little, even with all calibration activations in files") as caught:
        run(llama, tmp_path / "out", tokens, memory="1MiB")
    least = float(caught.value.hint.split()[3])
    assert 0.9 * current_memory() < least * 2**30 < 1.2 * current_memory() + 2**29
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("memory", "size"),
    [("8GiB", 2**33), ("500MB", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("123", 123), (77, 77), (None, None)],
)
def test_sizes_are_read(memory: Any, size: int | None) -> None:
    assert PruneConfig(model="model", output="out", memory=memory).memory == size


@pytest.mark.parametrize("memory", ["much", "8 gigs", "0", "-1GiB"])
def test_other_sizes_are_refused(memory: str) -> None:
    with pytest.raises(SettingsError, match="is not a size, like 8GiB"):
        PruneConfig(model="model", output="out", memory=memory)


@pytest.mark.parametrize("off_device", [False, True])
def test_activations_stay_on_a_gpu_unless_told_otherwise(
    tmp_path: Path, llama: Path, tokens: Path, off_device: bool
) -> None:
    settings = {"dtype": "bfloat16", "activations_off_device": off_device}
    config = PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, **settings)
    prepared = prepare_prune(config, Silent(), Ranks())
    prepared.job.skeleton.device = torch.device("cuda")
    assert activation_memory(prepared, tmp_path).on_device is not off_device
