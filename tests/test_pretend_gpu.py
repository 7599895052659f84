"""Every step works on a device that is not the CPU, with the tensors that the CPU gives (`tests/pretend_gpu.py`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.conftest import make_model
from tests.helpers.text import add_tokenizer

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no devices written in Python", allow_module_level=True)

SETTINGS: tuple[dict[str, Any], ...] = (
    {"initial": "magnitude"},
    {"initial": "sparsegpt", "keep_updates": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "prune_head": True},
    {"initial": "ria", "pattern": "2:4", "sparsity": None, "format": "packed"},
    {"initial": "dsnot", "rebuild": False},
    {"initial": "alps", "rebuild": False},
    {"preset": "mask"},
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares"},
    {"preset": "mask", "interrupted": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "room": 20_000},
    {"preset": "mask", "room": 10**9},
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares", "room": 60_000},
)
# Weights as (in, out); experts, apart and stacked; state spaces; positions by ALiBi; complex rotations.
FAMILIES = ("gpt2", "mixtral", "gpt_oss", "jamba", "falcon-rw", "deepseek_v2")


def results(*settings: dict[str, Any]) -> list[float]:
    """Results of one process for all settings: starting it takes longer than most of these runs."""
    command = [sys.executable, "-m", "tests.pretend_gpu", *map(json.dumps, settings)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.returncode, process.stderr[-3000:]
    return [float(line) for line in process.stdout.splitlines()]


def test_every_method_and_kind_of_model_gives_the_same_tensors(tmp_path: Path, llama: Path, tokens: Path) -> None:
    common = {"calibration": str(tokens), "dtype": "float32", "batch_size": 2}
    runs = [common | {"model": str(llama)} | settings for settings in SETTINGS]
    for family in FAMILIES:
        model = make_model(tmp_path / family, family)
        runs.append({**common, "model": str(model), "preset": "paper", "rebuild_ratio": 0.5})
    *same, tuned = results(*runs, {**common, "model": str(llama), "preset": "best"})
    assert same == [0.0] * len(runs)
    assert tuned < 1e-4  # autograd adds up in another order on another device


def test_a_step_of_tuning_waits_for_the_device_no_more_often_than_it_did(llama: Path, tokens: Path) -> None:
    """Once for the ties of each linear, once for the scale of each sequence, and once for what is not finite."""
    linears, sequences = 7, 4
    settings = {"model": str(llama), "calibration": str(tokens), "preset": "mask", "guard": 0, "counted": True}
    assert results({**settings, "dtype": "float32", "batch_size": 2}) == [linears + sequences + 1]


def test_measures_are_the_same(tmp_path: Path, llama: Path) -> None:
    other = make_model(tmp_path / "other", "llama", seed=1)
    for model in (llama, other):
        add_tokenizer(model)
    (tmp_path / "text.txt").write_text("ab cd " * 200)
    model = {"model": str(other), "against": str(llama), "dtype": "float32", "batch_size": 2}
    assert results({**model, "text": [str(tmp_path / "text.txt")], "windows": 4, "seqlen": 24}) == [0.0]
